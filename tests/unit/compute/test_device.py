"""compute.device and device_backend on the one device every machine has: the CPU, which has neither events nor queues
of its own, so what is refused and counted here needs no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from pipo.base.errors import ComputeError, OutOfDeviceMemory
from pipo.base.tensor_type import TensorType
from pipo.base.units import PAGE_BYTES
from pipo.compute.device import ComputeDevice
from pipo.compute.device_backend import DeviceBackend, Event
from pipo.compute.devices import CpuBackend, Device, DeviceKind, list_devices
from pipo.compute.ggml import Library
from pipo.compute.graph import Workspace
from pipo.compute.graphs import Builder, WeightType
from pipo.compute.repack import RepackBuffer
from tests.support.device_graphs import DeviceRig
from tests.support.graphs import built, floats, linear, product, quantised

F32, Q8_0 = TensorType.F32, TensorType.Q8_0


@pytest.fixture
def name(lib: Library) -> str:
    return next(device.name for device in list_devices(lib) if device.kind is DeviceKind.CPU)


@pytest.fixture
def rig(lib: Library, name: str) -> Iterator[DeviceRig]:
    with DeviceRig(lib, name) as rig:
        yield rig


def test_a_device_says_what_it_is(lib: Library, rig: DeviceRig) -> None:
    assert rig.device.info.kind is DeviceKind.CPU
    assert rig.device.info.total_bytes >= rig.device.free_bytes > 0
    assert rig.device.max_buffer_bytes > rig.device.alignment > 0
    assert rig.device.tensor_bytes(Q8_0, (64, 3)) == 3 * Q8_0.row_bytes(64)


def test_a_device_that_is_not_there(lib: Library, name: str) -> None:
    with pytest.raises(ComputeError, match=f"no device 'Abacus0', only .*{name}"):
        DeviceBackend.open(lib, "Abacus0")


def test_weights_move_through_a_buffer(lib: Library, rig: DeviceRig, backend: CpuBackend) -> None:
    """Bound by place, at two places in turn, the product is the one of the plain path."""
    graph = rig.build(linear(Q8_0, 64, 32, 3))
    x, y = floats(3, 64), np.empty((3, 32), np.float32)
    rest = rig.place({"x": x, "y": y})
    slot = rig.allocate(2 * 32 * Q8_0.row_bytes(64) + 2 * rig.device.alignment)
    for offset in (0, rig.device.alignment * 70, 0):
        raw = quantised(lib, Q8_0, floats(32, 64))
        slot.upload(offset, raw.ctypes.data, raw.nbytes)
        graph.bind(graph.device_binding({**rest, "w": slot.place(offset)}))
        graph.run(rig.queue)
        rest["y"].buffer.download(rest["y"].offset, y.ctypes.data, y.nbytes)
        np.testing.assert_array_equal(y, product(lib, backend, Q8_0, raw, x))


def test_views_follow_their_leaf(lib: Library, rig: DeviceRig) -> None:
    """`buffer` and `data` of a leaf and of every view of it, as written by hand from ggml.h."""

    def lay(ops: Builder) -> None:
        heads = ops.heads_view(ops.leaf("rows", F32, 8, 4), 4, 2, 3)
        ops.expand(ops.output("sum", ops.add(heads, ops.leaf("one", F32, 4))))

    graph, buffer = rig.build(lay), rig.allocate(PAGE_BYTES)
    binding = graph.device_binding({"rows": buffer.place(1024)})
    assert [value for _, value in binding] == 2 * [buffer.base + 1024, buffer.handle]
    assert len({ctypes.addressof(field) for field, _ in binding}) == 4


def test_what_is_held_is_counted(lib: Library, rig: DeviceRig) -> None:
    with rig.device.allocate(1000), rig.device.allocate(24):
        assert rig.device.held_bytes == 1024
        assert rig.device.free_bytes <= rig.device.info.total_bytes - 1024
    assert rig.device.held_bytes == 0


def test_workspaces_are_counted(lib: Library, rig: DeviceRig) -> None:
    ops, workspace = Builder(lib), Workspace(lib, rig.device)
    x = ops.rms_norm(ops.rms_norm(ops.leaf("x", F32, 1024), 1e-5), 1e-5)
    ops.expand(ops.output("y", ops.rms_norm(x, 1e-5)))
    graph = ops.finish()
    needed = workspace.measure(graph)
    assert rig.device.held_bytes == 0 and needed >= 4096
    workspace.reserve(graph)
    assert rig.device.held_bytes == workspace.num_bytes == needed
    workspace.place(graph)
    assert rig.device.held_bytes == needed
    graph.free()
    workspace.close()
    workspace.close()
    assert rig.device.held_bytes == 0


def test_more_than_there_is(rig: DeviceRig, monkeypatch: pytest.MonkeyPatch) -> None:
    total = rig.device.info.total_bytes
    with pytest.raises(OutOfDeviceMemory, match="for a buffer") as refused:
        rig.device.allocate(total + 1)
    assert refused.value.wanted_bytes == total + 1 > refused.value.free_bytes > 0
    monkeypatch.setattr(rig.device.lib, "backend_buft_alloc_buffer", lambda *_: None)
    with pytest.raises(OutOfDeviceMemory, match="for one buffer"):
        rig.device.allocate(1)
    assert rig.device.held_bytes == 0


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_a_buffer_of_nothing(rig: DeviceRig, num_bytes: int) -> None:
    with pytest.raises(ComputeError, match=f"a device buffer of {num_bytes} bytes"):
        rig.device.allocate(num_bytes)


def test_memory_without_pinning(rig: DeviceRig) -> None:
    assert not rig.device.info.caps.has_host_buffer
    host = rig.device.allocate_host(PAGE_BYTES)
    assert not host.is_pinned and host.address % PAGE_BYTES == 0
    ctypes.memset(host.address, 1, PAGE_BYTES)
    host.free()
    host.free()


def test_a_device_without_events(rig: DeviceRig) -> None:
    assert rig.open_copy_queue() is None
    with pytest.raises(ComputeError, match="has no events"):
        Event(rig.device)


def test_repacked_weights_stay_on_the_cpu(lib: Library, rig: DeviceRig, repack: RepackBuffer) -> None:
    ops, workspace = Builder(lib, repack), Workspace(lib, rig.device)
    weight = ops.weight("w", WeightType(TensorType.Q4_0, is_repacked=True), 64, 64)
    ops.expand(ops.output("y", ops.mul_mat(weight, ops.leaf("x", F32, 64))))
    graph = ops.build(workspace)
    with pytest.raises(ComputeError, match="w is repacked for the CPU"):
        graph.device_binding({"w": rig.allocate(PAGE_BYTES).place(0)})
    graph.free()
    workspace.close()


def test_a_buffer_of_another_device(lib: Library, rig: DeviceRig, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ComputeDevice(lib, rig.device.name)
    graph, buffer = rig.build(linear(F32, 64, 32, 1)), other.allocate(PAGE_BYTES)
    monkeypatch.setattr(other, "handle", other.handle + 1)
    with pytest.raises(ComputeError, match="its graph on"):
        graph.device_binding({"x": buffer.place(0)})
    with pytest.raises(ComputeError, match="a buffer of"):
        rig.queue.upload_async(buffer, 0, 0, 1)
    buffer.free()


def test_a_graph_of_the_cpu_is_no_graph_of_a_device(lib: Library, rig: DeviceRig) -> None:
    place = rig.allocate(PAGE_BYTES).place(0)
    with built(lib, linear(F32, 64, 32, 1)) as graph, pytest.raises(ComputeError, match="its graph on the CPU"):
        graph.device_binding({"x": place})


def test_measuring_reserves_nothing(lib: Library) -> None:
    """ggml's allocator, once it has measured a graph, would place it in memory that it never took."""
    workspace = Workspace(lib)
    ops = Builder(lib)
    ops.expand(ops.output("y", ops.rms_norm(ops.rms_norm(ops.leaf("x", F32, 64), 1e-5), 1e-5)))
    graph = ops.finish()
    assert workspace.measure(graph) >= 256 and workspace.num_bytes == 0
    workspace.place(graph)
    assert workspace.num_bytes >= 256
    graph.free()
    workspace.close()


def test_devices_are_values(lib: Library) -> None:
    assert all(isinstance(device, Device) and device.caps is not None for device in list_devices(lib))
