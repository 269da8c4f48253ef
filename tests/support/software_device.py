"""Works around a crash of Mesa's software driver 22.3, which Debian 12 has.

libggml's Vulkan backend frees its scratch memory when a graph wants more of it, and the driver then follows descriptors
that earlier graphs left behind. Where the first graph of a queue wants more than any later one does, nothing is freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from pipo.base.tensor_type import TensorType
from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice, DeviceBuffer
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.graph import Workspace
from pipo.compute.graphs import Builder

HEAD_DIM, NUM_HEADS, NUM_ROWS, NUM_QUERIES = 64, 4, 512, 16  # attention that is split, and keeps many results apart


@contextmanager
def scratch_comes_first() -> Iterator[None]:
    """For every queue that is opened meanwhile."""
    opened: dict[DeviceBackend, _Scratch] = {}
    init, close = DeviceBackend.__init__, DeviceBackend.close

    def open_with_scratch(self: DeviceBackend, device: ComputeDevice) -> None:
        init(self, device)
        opened[self] = _Scratch(device, self)

    def close_with_scratch(self: DeviceBackend) -> None:
        close(self)
        scratch = opened.pop(self, None)
        if scratch is not None:
            scratch.free()

    with (
        patch.object(DeviceBackend, "__init__", open_with_scratch),
        patch.object(DeviceBackend, "close", close_with_scratch),
    ):
        yield


class _Scratch:
    """What the graph reads and writes; it has to outlive the queue. No account of the device has it."""

    def __init__(self, device: ComputeDevice, backend: DeviceBackend) -> None:
        self._lib = device.lib
        self._held = device.held_bytes
        self._workspace = Workspace(device.lib, device)
        ops = Builder(device.lib)
        q = ops.leaf("q", TensorType.F32, HEAD_DIM, NUM_HEADS, NUM_QUERIES)
        caches = [ops.leaf(name, TensorType.F32, HEAD_DIM * NUM_HEADS, NUM_ROWS) for name in ("k", "v")]
        keys, values = (ops.heads_view(cache, HEAD_DIM, NUM_HEADS, NUM_ROWS) for cache in caches)
        mask = ops.leaf("mask", TensorType.F16, NUM_ROWS, NUM_QUERIES)
        ops.expand(ops.flash_attention(ops.permute(q, 0, 2, 1), keys, values, mask, 1.0))
        self._graph = ops.build(self._workspace)
        sizes = {name: round_up(self._graph.leaf_bytes(name), device.alignment) for name in self._graph.leaf_names}
        self._buffer = DeviceBuffer(device, sum(sizes.values()))
        self._buffer.clear()
        ends = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
        places = {name: self._buffer.place(end) for name, end in zip(sizes, ends, strict=True)}
        self._graph.bind(self._graph.device_binding(places))
        self._graph.run_async(backend)  # unlike `run` and `allocate`, no test makes this fail
        backend.synchronize()
        self._taken = device.held_bytes - self._held
        device.hold(-self._taken)
        self._device = device

    def free(self) -> None:
        self._device.hold(self._taken)
        self._graph.free()
        self._workspace.close()
        self._buffer.free()
