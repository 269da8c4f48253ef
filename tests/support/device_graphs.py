"""A queue of a device with graphs and numpy arrays on it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType

from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice, DeviceBuffer, DevicePlace
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.ggml import Library
from pipo.compute.graph import Graph, Workspace
from pipo.compute.graphs import Builder
from tests.support.graphs import Array, Lay


class DeviceRig:
    """Everything it hands out is given back at its end, after the queue and its copy queues."""

    def __init__(self, lib: Library, device_name: str) -> None:
        self.device = ComputeDevice(lib, device_name)
        self.queue = DeviceBackend(self.device)
        self._memory, self._queues = ExitStack(), ExitStack()
        self._queues.callback(self.queue.close)

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        return self._memory.enter_context(self.device.allocate(num_bytes))

    def build(self, lay: Lay, max_nodes: int = 128) -> Graph:
        """A graph with a workspace of its own on the device."""
        ops, workspace = Builder(self.device.lib, None, max_nodes), Workspace(self.device.lib, self.device)
        self._memory.callback(workspace.close)
        self._memory.callback(ops.free)
        lay(ops)
        graph = ops.build(workspace)
        self._memory.callback(graph.free)
        return graph

    def open_copy_queue(self) -> DeviceBackend | None:
        queue = self.queue.open_copy_queue()
        return queue if queue is None else self._queues.enter_context(queue)

    def place(self, arrays: Mapping[str, Array]) -> dict[str, DevicePlace]:
        """One buffer that holds copies of all these arrays, each where the device wants a tensor to begin."""
        offsets, end = {}, 0
        for name, array in arrays.items():
            offsets[name] = end
            end = round_up(end + array.nbytes, self.device.alignment)
        buffer = self.allocate(end)
        return {name: fill(buffer, offsets[name], array) for name, array in arrays.items()}

    def run_once(self, lay: Lay, **arrays: Array) -> None:
        """Like `graphs.run_once`: afterwards the arrays hold what the device wrote."""
        graph, places = self.build(lay), self.place(arrays)
        graph.bind(graph.device_binding({name: places[name] for name in graph.leaf_names}))
        graph.run(self.queue)
        for name, array in arrays.items():
            fetch(places[name], array)

    def close(self) -> None:
        self._queues.close()
        self._memory.close()
        assert self.device.held_bytes == 0

    def __enter__(self) -> DeviceRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fill(buffer: DeviceBuffer, offset: int, array: Array) -> DevicePlace:
    buffer.upload(offset, array.ctypes.data, array.nbytes)
    return buffer.place(offset)


def fetch(place: DevicePlace, array: Array) -> None:
    """Fill the array from the device."""
    place.buffer.download(place.offset, array.ctypes.data, array.nbytes)
