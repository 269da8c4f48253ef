"""The meter's work on a device: the same graphs, over memory of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from pipo.base.machine import LinkProfile
from pipo.base.tensor_type import TensorType
from pipo.base.units import KIB, MIB
from pipo.compute.device import ComputeDevice, DeviceBuffer, DevicePlace
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.graph import Graph, Workspace
from pipo.compute.graphs import Builder
from pipo.hardware.meter import Lay, Span, build, pattern, typical_s
from pipo.transfer.device import BLOCK_BYTES

_INPUT_BYTES = 4 * MIB  # masks and positions
_SMALL_BYTES = 4 * KIB  # a copy whose time is all latency


@dataclass(frozen=True, slots=True)
class _Window:
    """Addresses of no memory, each of which stands for a byte of a device buffer."""

    address: int
    buffer: DeviceBuffer

    @property
    def num_bytes(self) -> int:
        return self.buffer.num_bytes

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.num_bytes


class DeviceMeter:
    """A Meter whose `weights` and `activations` lie on a device. Close it to give them back. Threads: one.

    Raises OutOfDeviceMemory.
    """

    num_threads = 1

    def __init__(self, device: ComputeDevice, weights_bytes: int, activation_bytes: int) -> None:
        self._device = device
        self._exit = ExitStack()
        try:
            sizes = (weights_bytes, activation_bytes, _INPUT_BYTES)
            buffers = [self._exit.enter_context(device.allocate(size)) for size in sizes]
        except BaseException:
            self._exit.close()
            raise
        starts = [(i + 1) << 44 for i in range(len(buffers))]  # beyond what any host address is
        self._windows = [_Window(start, buffer) for start, buffer in zip(starts, buffers, strict=True)]
        self._inputs: dict[int, DevicePlace] = {}
        self._input_end = 0
        for buffer in buffers:
            _fill(buffer)

    @property
    def weights(self) -> Span:
        return self._windows[0]

    @property
    def activations(self) -> Span:
        return self._windows[1]

    def is_repackable(self, type_: TensorType, shape: tuple[int, int]) -> bool:
        return False

    def graph_s(self, graph: Graph, addresses: Sequence[Mapping[str, int]], duration_s: float) -> float:
        """Of one run, its leaves at each of `addresses` in turn."""
        bindings = [
            graph.device_binding({name: self._place(graph, name, at) for name, at in each.items()})
            for each in addresses
        ]

        # a queue for each graph, closed before the graph's workspace goes: drivers may follow its descriptors later
        with DeviceBackend(self._device) as backend:

            def run(i: int) -> None:
                graph.bind(bindings[i % len(bindings)])
                graph.run(backend)

            return typical_s(run, duration_s)

    @contextmanager
    def built(self, lay: Lay, max_nodes: int = 128) -> Iterator[Graph]:
        """A graph with a workspace of its own."""
        with build(Builder(self._device.lib, None, max_nodes), Workspace(self._device.lib, self._device), lay) as graph:
            yield graph

    def links(self, duration_s: float) -> tuple[LinkProfile, LinkProfile]:
        """To the device and back, as weights and results move."""
        host = np.zeros(min(BLOCK_BYTES, self.weights.num_bytes), np.uint8)
        buffer = self._windows[0].buffer
        return (
            _link(lambda size: buffer.upload(0, host.ctypes.data, size), host.nbytes, duration_s / 2),
            _link(lambda size: buffer.download(0, host.ctypes.data, size), host.nbytes, duration_s / 2),
        )

    def _place(self, graph: Graph, name: str, address: int) -> DevicePlace:
        for window in self._windows:
            if window.holds(address):
                return window.buffer.place(address - window.address)
        return self._input(address, graph.leaf_bytes(name))

    def _input(self, address: int, num_bytes: int) -> DevicePlace:
        """Of an array of the host, brought over once."""
        if address not in self._inputs:
            window = self._windows[2]
            alignment = self._device.alignment
            place = window.buffer.place(self._input_end)
            place.buffer.upload(place.offset, address, num_bytes)
            self._input_end += -(-num_bytes // alignment) * alignment
            self._inputs[address] = place
        return self._inputs[address]

    def close(self) -> None:
        self._exit.close()

    def __enter__(self) -> DeviceMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _link(copy: Callable[[int], None], num_bytes: int, duration_s: float) -> LinkProfile:
    """From a large copy and one that is all latency."""
    small_s = typical_s(lambda _: copy(_SMALL_BYTES), duration_s / 4)
    large_s = typical_s(lambda _: copy(num_bytes), duration_s * 3 / 4)
    return LinkProfile(num_bytes / max(large_s - small_s, 1e-9), small_s, chunk_bytes=num_bytes, depth=1)


def _fill(buffer: DeviceBuffer) -> None:
    bytes_ = pattern()
    for start in range(0, buffer.num_bytes, len(bytes_)):
        buffer.upload(start, bytes_.ctypes.data, min(len(bytes_), buffer.num_bytes - start))
