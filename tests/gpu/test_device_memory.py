"""What would end the process in ggml is a typed error before it gets there, and giving back twice is harmless."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pipo.base.errors import ComputeError, OutOfDeviceMemory
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, PAGE_BYTES
from pipo.compute.device import ComputeDevice
from pipo.compute.device_backend import DeviceBackend, Event
from pipo.compute.devices import CpuBackend
from pipo.compute.graph import Workspace
from pipo.compute.graphs import Builder
from tests.support.device_graphs import built_on, placed
from tests.support.graphs import bind, built, floats, linear

F32 = TensorType.F32
SMALL = linear(F32, 64, 32, 2)


def small_arrays() -> dict[str, np.ndarray]:
    return {"x": floats(2, 64), "w": floats(32, 64), "y": floats(2, 32)}


def test_bytes_come_back_as_they_went(device: ComputeDevice) -> None:
    """At any offset and length: alignment is asked of tensors, not of copies."""
    sent, got = np.random.default_rng(1).bytes(MIB + 13), ctypes.create_string_buffer(MIB + 13)
    with device.allocate(3 * MIB) as buffer:
        buffer.upload(7, ctypes.cast(sent, ctypes.c_void_p).value or 0, len(sent))
        buffer.download(7, ctypes.addressof(got), len(sent))
    assert got.raw == sent


def test_more_than_the_device_has_is_a_typed_error(device: ComputeDevice) -> None:
    free = device.free_bytes
    with pytest.raises(OutOfDeviceMemory, match="for a buffer") as refused:
        device.allocate(free + 1)
    assert (refused.value.wanted_bytes, refused.value.free_bytes) == (free + 1, free)


def test_what_is_held_counts_even_where_the_driver_does_not_count_it(device: ComputeDevice) -> None:
    free = device.free_bytes
    with device.allocate(free // 2), pytest.raises(OutOfDeviceMemory):
        device.allocate(free // 2 + 2)
    assert device.held_bytes == 0


def test_a_workspace_larger_than_the_device_is_a_typed_error(device: ComputeDevice) -> None:
    num_tokens = device.free_bytes // (64 * 4)

    def lay(ops: Builder) -> None:
        x = ops.leaf("x", F32, 64, num_tokens)
        ops.expand(ops.output("y", ops.rms_norm(ops.mul(ops.rms_norm(x, 1e-5), ops.leaf("w", F32, 64)), 1e-5)))

    ops, workspace = Builder(device.lib), Workspace(device.lib, device)
    lay(ops)
    with pytest.raises(ComputeError):  # too large for the device, or for one tensor of it
        ops.build(workspace)
    workspace.close()


def test_misaligned_places_and_ranges_outside_are_refused(device: ComputeDevice) -> None:
    arrays = small_arrays()
    with built_on(device, SMALL) as graph, placed(device, arrays) as places:
        buffer = places["x"].buffer
        with pytest.raises(
            ComputeError, match=f"w at offset 4 of a device buffer, not a multiple of {device.alignment}"
        ):
            graph.device_binding({"w": buffer.place(4)})
        end = buffer.num_bytes // device.alignment * device.alignment
        with pytest.raises(ComputeError, match=f"of a device buffer of {buffer.num_bytes}"):
            graph.device_binding({"w": buffer.place(end - device.alignment)})
        with pytest.raises(ComputeError, match="of a device buffer of"):
            buffer.upload(end, arrays["w"].ctypes.data, arrays["w"].nbytes)
        with pytest.raises(ComputeError, match="of a device buffer of"):
            buffer.download(-1, arrays["w"].ctypes.data, 1)


def test_freed_memory_is_refused(gpu: DeviceBackend, device: ComputeDevice) -> None:
    with built_on(device, SMALL) as graph:
        buffer = device.allocate(MIB)
        buffer.free()
        buffer.free()
        with pytest.raises(ComputeError, match="freed"):
            graph.device_binding({"w": buffer.place(0)})
        with pytest.raises(ComputeError, match="freed"):
            gpu.upload_async(buffer, 0, 0, 16)


def test_a_graph_with_something_unbound_does_not_run(gpu: DeviceBackend, device: ComputeDevice) -> None:
    with built_on(device, SMALL) as graph, placed(device, small_arrays()) as places:
        with pytest.raises(ComputeError, match="nothing is bound to x, w, y"):
            graph.run(gpu)
        graph.bind(graph.device_binding({name: places[name] for name in ("x", "w")}))
        with pytest.raises(ComputeError, match="nothing is bound to y"):
            graph.run(gpu)
        graph.bind(graph.device_binding(places))
        graph.run(gpu)


def test_a_graph_runs_only_where_it_was_placed(gpu: DeviceBackend, device: ComputeDevice, cpu: CpuBackend) -> None:
    arrays = small_arrays()
    with built(device.lib, SMALL) as on_cpu, built_on(device, SMALL) as on_gpu, placed(device, arrays) as places:
        with pytest.raises(ComputeError, match="its graph on the CPU"):
            on_cpu.device_binding(places)
        bind(on_cpu, arrays)
        with pytest.raises(ComputeError, match="on the CPU runs only there"):
            on_cpu.run_async(gpu)
        on_gpu.bind(on_gpu.device_binding(places))
        with pytest.raises(ComputeError, match="runs only there"):
            on_gpu.run(cpu)


def test_an_op_the_device_lacks_is_refused_by_name(device: ComputeDevice) -> None:
    """Attention of heads of 20: ggml's GPU kernels take them in steps of 8 or more."""

    def lay(ops: Builder) -> None:
        q, mask = ops.leaf("q", F32, 20, 4, 2), ops.leaf("mask", TensorType.F16, 256, 4)
        k, v = (ops.leaf(name, TensorType.F16, 20, 256, 2) for name in "kv")
        ops.expand(ops.flash_attention(q, k, v, mask, 0.1))

    ops, workspace = Builder(device.lib), Workspace(device.lib, device)
    lay(ops)
    with pytest.raises(ComputeError, match=rf"{device.name} does not compute FLASH_ATTN_EXT of F32 .*F16.*→ F32"):
        ops.build(workspace)
    ops.free()
    workspace.close()


def test_pinned_memory_begins_on_a_page(device: ComputeDevice) -> None:
    with device.allocate_host(MIB) as host, device.allocate(MIB) as buffer:
        assert host.address % PAGE_BYTES == 0
        ctypes.memset(host.address, 7, MIB)
        buffer.upload(0, host.address, MIB)
        ctypes.memset(host.address, 0, MIB)
        buffer.download(0, host.address, MIB)
        assert ctypes.string_at(host.address, MIB) == b"\7" * MIB
    host.free()


def test_closing_twice_is_harmless(device: ComputeDevice) -> None:
    queue = DeviceBackend(device)
    queue.close()
    queue.close()
    with pytest.raises(ComputeError, match="closed"):
        queue.synchronize()
    if device.info.caps.has_events:
        event = Event(device)
        event.synchronize()
        event.free()
        event.free()
        with pytest.raises(ComputeError, match="freed"):
            event.synchronize()
