"""Graphs whose leaves lie in buffers of a device, filled from numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice, DeviceBuffer, DevicePlace
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.graph import Graph, Workspace
from pipo.compute.graphs import Builder
from tests.support.graphs import Array, Lay


@contextmanager
def built_on(device: ComputeDevice, lay: Lay, max_nodes: int = 128) -> Iterator[Graph]:
    """A graph with a workspace of its own on the device."""
    ops, workspace = Builder(device.lib, None, max_nodes), Workspace(device.lib, device)
    try:
        lay(ops)
        graph = ops.build(workspace)
        try:
            yield graph
        finally:
            graph.free()
    finally:
        ops.free()
        workspace.close()


@contextmanager
def placed(device: ComputeDevice, arrays: Mapping[str, Array]) -> Iterator[dict[str, DevicePlace]]:
    """One buffer that holds copies of all these arrays, each where the device wants a tensor to begin."""
    offsets, end = {}, 0
    for name, array in arrays.items():
        offsets[name] = end
        end = round_up(end + array.nbytes, device.alignment)
    with device.allocate(end) as buffer:
        for name, array in arrays.items():
            buffer.upload(offsets[name], array.ctypes.data, array.nbytes)
        yield {name: buffer.place(offset) for name, offset in offsets.items()}


def fetch(place: DevicePlace, array: Array) -> None:
    """Fill the array from the device."""
    place.buffer.download(place.offset, array.ctypes.data, array.nbytes)


def run_once_on(gpu: DeviceBackend, lay: Lay, **arrays: Array) -> None:
    """Like `run_once`: afterwards the arrays hold what the device wrote."""
    with built_on(gpu.device, lay) as graph, placed(gpu.device, arrays) as places:
        graph.bind(graph.device_binding(places))
        graph.run(gpu)
        for name, array in arrays.items():
            fetch(places[name], array)


def filled(buffer: DeviceBuffer, offset: int, array: Array) -> DevicePlace:
    buffer.upload(offset, array.ctypes.data, array.nbytes)
    return buffer.place(offset)
