"""What would end the process in ggml is a typed error before it gets there, and giving back twice is harmless."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pipo.base.errors import ComputeError, OutOfDeviceMemory
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, PAGE_BYTES
from pipo.compute.device_backend import DeviceBackend, Event
from pipo.compute.devices import CpuBackend
from pipo.compute.graphs import Builder
from tests.support.device_graphs import DeviceRig
from tests.support.graphs import Array, bind, built, floats, linear

F32 = TensorType.F32
SMALL = linear(F32, 64, 32, 2)


def small_arrays() -> dict[str, Array]:
    return {"x": floats(2, 64), "w": floats(32, 64), "y": floats(2, 32)}


def test_bytes_come_back_as_they_went(gpu: DeviceRig) -> None:
    """At any offset and length: alignment is asked of tensors, not of copies."""
    sent = np.frombuffer(np.random.default_rng(1).bytes(MIB + 13), np.uint8)
    got, buffer = np.zeros_like(sent), gpu.allocate(3 * MIB)
    buffer.upload(7, sent.ctypes.data, sent.nbytes)
    buffer.download(7, got.ctypes.data, got.nbytes)
    np.testing.assert_array_equal(got, sent)


def test_more_than_the_device_has_is_a_typed_error(gpu: DeviceRig) -> None:
    free = gpu.device.free_bytes
    with pytest.raises(OutOfDeviceMemory, match="for a buffer") as refused:
        gpu.device.allocate(free + 1)
    assert (refused.value.wanted_bytes, refused.value.free_bytes) == (free + 1, free)


def test_what_is_held_counts_even_where_the_driver_does_not_count_it(gpu: DeviceRig) -> None:
    free = gpu.device.free_bytes
    with gpu.device.allocate(free // 2), pytest.raises(OutOfDeviceMemory):
        gpu.device.allocate(free // 2 + 2)
    assert gpu.device.held_bytes == 0


def test_intermediates_larger_than_the_device_are_a_typed_error(gpu: DeviceRig) -> None:
    """100 MiB are left, and three results of 64 MiB are to live at once."""
    gpu.allocate(gpu.device.free_bytes - 100 * MIB)
    num_rows = 64 * MIB // 4096

    def lay(ops: Builder) -> None:
        x, w = ops.leaf("x", F32, 1024), ops.leaf("w", F32, 1024, num_rows)
        results = [ops.mul(ops.rms_norm(w, epsilon), x) for epsilon in (1e-5, 1e-6, 1e-7)]
        ops.expand(ops.output("y", ops.add(ops.add(results[0], results[1]), results[2])))

    with pytest.raises(OutOfDeviceMemory, match="for intermediate results"):
        gpu.build(lay)


def test_misaligned_places_and_ranges_outside_are_refused(gpu: DeviceRig) -> None:
    graph, buffer, alignment, x = gpu.build(SMALL), gpu.allocate(PAGE_BYTES), gpu.device.alignment, floats(2, 64)
    with pytest.raises(ComputeError, match=f"x at offset 4 of a device buffer, not a multiple of {alignment}"):
        graph.device_binding({"x": buffer.place(4)})
    with pytest.raises(ComputeError, match=f"of a device buffer of {PAGE_BYTES}"):
        graph.device_binding({"x": buffer.place(PAGE_BYTES - alignment)})
    with pytest.raises(ComputeError, match="of a device buffer of"):
        buffer.upload(PAGE_BYTES - 1, x.ctypes.data, 2)
    with pytest.raises(ComputeError, match="of a device buffer of"):
        buffer.download(-1, x.ctypes.data, 1)


def test_freed_memory_is_refused(gpu: DeviceRig) -> None:
    graph, buffer = gpu.build(SMALL), gpu.allocate(MIB)
    buffer.free()
    buffer.free()
    with pytest.raises(ComputeError, match="freed"):
        graph.device_binding({"w": buffer.place(0)})
    with pytest.raises(ComputeError, match="freed"):
        gpu.queue.upload_async(buffer, 0, 0, 16)


def test_a_graph_with_something_unbound_does_not_run(gpu: DeviceRig) -> None:
    graph, places = gpu.build(SMALL), gpu.place(small_arrays())
    with pytest.raises(ComputeError, match="nothing is bound to x, w, y"):
        graph.run(gpu.queue)
    graph.bind(graph.device_binding({name: places[name] for name in ("x", "w")}))
    with pytest.raises(ComputeError, match="nothing is bound to y"):
        graph.run(gpu.queue)
    graph.bind(graph.device_binding(places))
    graph.run(gpu.queue)


def test_a_graph_runs_only_where_it_was_placed(gpu: DeviceRig, cpu: CpuBackend) -> None:
    arrays = small_arrays()
    on_gpu, places = gpu.build(SMALL), gpu.place(arrays)
    on_gpu.bind(on_gpu.device_binding(places))
    with pytest.raises(ComputeError, match="runs only there"):
        on_gpu.run(cpu)
    with built(gpu.device.lib, SMALL) as on_cpu:
        with pytest.raises(ComputeError, match="its graph on the CPU"):
            on_cpu.device_binding(places)
        bind(on_cpu, arrays)
        with pytest.raises(ComputeError, match="on the CPU runs only there"):
            on_cpu.run_async(gpu.queue)


def test_an_op_the_device_lacks_is_refused_by_name(gpu: DeviceRig) -> None:
    """Attention of heads of 20: ggml's GPU kernels take them in steps of 8 or more."""

    def lay(ops: Builder) -> None:
        q, mask = ops.leaf("q", F32, 20, 4, 2), ops.leaf("mask", TensorType.F16, 256, 4)
        k, v = (ops.leaf(name, TensorType.F16, 20, 256, 2) for name in "kv")
        ops.expand(ops.flash_attention(q, k, v, mask, 0.1))

    with pytest.raises(ComputeError, match=rf"{gpu.device.name} does not compute FLASH_ATTN_EXT of F32 .*F16.*→ F32"):
        gpu.build(lay)


def test_host_memory_begins_on_a_page(gpu: DeviceRig) -> None:
    buffer = gpu.allocate(MIB)
    with gpu.device.allocate_host(MIB) as host:
        assert host.address % PAGE_BYTES == 0
        ctypes.memset(host.address, 7, MIB)
        buffer.upload(0, host.address, MIB)
        ctypes.memset(host.address, 0, MIB)
        buffer.download(0, host.address, MIB)
        assert ctypes.string_at(host.address, MIB) == b"\7" * MIB
    host.free()


def test_closing_twice_is_harmless(gpu: DeviceRig) -> None:
    queue = DeviceBackend(gpu.device)
    queue.close()
    queue.close()
    with pytest.raises(ComputeError, match="closed"):
        queue.synchronize()
    if not gpu.device.info.caps.has_events:
        return
    event = Event(gpu.device)
    event.synchronize()
    event.free()
    event.free()
    with pytest.raises(ComputeError, match="freed"):
        event.synchronize()
