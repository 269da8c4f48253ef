"""Weights stream through two slots of a device: whatever arrives where, the product is that of the weights at rest.

Bit for bit, since it is the same kernel on the same bytes. A wrong order of copy and compute shows as another weight.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from pipo.base.tensor_type import TensorType
from pipo.base.units import round_up
from pipo.compute.device import DeviceBuffer, DevicePlace
from pipo.compute.device_backend import DeviceBackend, Event
from pipo.compute.graph import Graph
from tests.support.device_graphs import DeviceRig, fetch, fill
from tests.support.graphs import Array, FloatArray, floats, linear, quantised

NUM_IN, NUM_OUT, NUM_TOKENS, NUM_WEIGHTS, NUM_STEPS, SEED = 256, 512, 2, 6, 60, 20250
TYPE = TensorType.Q4_0
WEIGHT_BYTES = NUM_OUT * TYPE.row_bytes(NUM_IN)
SLOT_BYTES = 2 * WEIGHT_BYTES  # room to begin at many offsets


class Rig:
    """A graph on the device, two slots, weights in host memory and the product of each, computed at rest."""

    def __init__(self, gpu: DeviceRig) -> None:
        self.gpu, device = gpu, gpu.device
        self.weights: list[Array] = [quantised(device.lib, TYPE, floats(NUM_OUT, NUM_IN)) for _ in range(NUM_WEIGHTS)]
        self.graph: Graph = gpu.build(linear(TYPE, NUM_IN, NUM_OUT, NUM_TOKENS))
        self.slots: list[DeviceBuffer] = [gpu.allocate(SLOT_BYTES) for _ in range(2)]
        self._rest = gpu.allocate(1 << 20)
        y_offset = round_up(NUM_TOKENS * NUM_IN * 4, device.alignment)
        self._x, self._y = fill(self._rest, 0, floats(NUM_TOKENS, NUM_IN)), self._rest.place(y_offset)
        self._random = random.Random(SEED)
        self.at_rest = [self._compute_at_rest(weight) for weight in self.weights]

    def _compute_at_rest(self, weight: Array) -> FloatArray:
        self.point_at(fill(self.slots[0], 0, weight))
        self.graph.run(self.gpu.queue)
        return self.result()

    def point_at(self, weight: DevicePlace) -> None:
        self.graph.bind(self.graph.device_binding({"x": self._x, "w": weight, "y": self._y}))

    def result(self) -> FloatArray:
        y = np.full((NUM_TOKENS, NUM_OUT), np.nan, np.float32)
        fetch(self._y, y)
        return y

    def steps(self) -> Iterator[tuple[int, DevicePlace]]:
        """Which weight comes next, and where in the slot of its turn it goes."""
        alignment = self.gpu.device.alignment
        for i in range(NUM_STEPS):
            offset = self._random.randrange(0, SLOT_BYTES - WEIGHT_BYTES, alignment)
            yield self._random.randrange(NUM_WEIGHTS), self.slots[i % 2].place(offset)

    def upload(self, weight_idx: int, place: DevicePlace) -> None:
        place.buffer.upload(place.offset, self.weights[weight_idx].ctypes.data, WEIGHT_BYTES)


@pytest.fixture
def rig(gpu: DeviceRig) -> Rig:
    return Rig(gpu)


def test_weights_are_told_apart(rig: Rig) -> None:
    """Otherwise the tests below would show nothing."""
    assert len({result.tobytes() for result in rig.at_rest}) == NUM_WEIGHTS


def test_slots_filled_in_turn(rig: Rig) -> None:
    for i, (weight_idx, place) in enumerate(rig.steps()):
        rig.upload(weight_idx, place)
        rig.point_at(place)
        rig.graph.run(rig.gpu.queue)
        np.testing.assert_array_equal(rig.result(), rig.at_rest[weight_idx], f"step {i} of seed {SEED}")


@pytest.mark.parametrize("start", [Graph.run, Graph.run_async], ids=["while the caller waits", "behind the caller"])
def test_second_thread_fills_the_next_slot_during_compute(
    rig: Rig, start: Callable[[Graph, DeviceBackend], None]
) -> None:
    """Blocking copies on a thread of ours: the way weights go to a device in the pipeline."""
    steps, queue = list(rig.steps()), rig.gpu.queue
    with ThreadPoolExecutor(1) as copier:
        arriving = copier.submit(rig.upload, *steps[0])
        for i, (weight_idx, place) in enumerate(steps):
            arriving.result()
            rig.point_at(place)
            start(rig.graph, queue)
            if i + 1 < NUM_STEPS:
                arriving = copier.submit(rig.upload, *steps[i + 1])
            queue.synchronize()
            np.testing.assert_array_equal(rig.result(), rig.at_rest[weight_idx], f"step {i} of seed {SEED}")
        arriving.result()


def test_copy_queue_with_events(rig: Rig) -> None:
    """Copies and graphs are only queued; two events a slot keep a copy behind the graph that last read the slot, and
    the graph behind the copy.
    """
    device, queue = rig.gpu.device, rig.gpu.queue
    copies = rig.gpu.open_copy_queue()
    if copies is None:
        pytest.skip(f"{device.name} has no events")
    with ExitStack() as stack:
        arrived, computed = ([Event(device) for _ in range(2)] for _ in range(2))
        for event in (*arrived, *computed):
            stack.callback(event.free)
        staging = [stack.enter_context(device.allocate_host(WEIGHT_BYTES)) for _ in range(2)]
        for i, (weight_idx, place) in enumerate(rig.steps()):
            slot = i % 2
            arrived[slot].synchronize()  # the staging buffer is free again
            ctypes.memmove(staging[slot].address, rig.weights[weight_idx].ctypes.data, WEIGHT_BYTES)
            copies.wait(computed[slot])
            copies.upload_async(place.buffer, place.offset, staging[slot].address, WEIGHT_BYTES)
            copies.record(arrived[slot])
            queue.wait(arrived[slot])
            rig.point_at(place)
            rig.graph.run_async(queue)
            queue.record(computed[slot])
            queue.synchronize()
            np.testing.assert_array_equal(rig.result(), rig.at_rest[weight_idx], f"step {i} of seed {SEED}")
        copies.synchronize()
