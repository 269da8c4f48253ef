"""Passes that mix tokens of several sequences on a device: each gets what the CPU gives it, wherever weights and keys
live.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bench.random_model import SHAPES
from pipo.compute.device import ComputeDevice
from pipo.planner.device_placement import place_on_device
from pipo.planner.placement import Placement, place, smallest_bytes
from tests.gpu.test_device_engine import relative_error, split
from tests.support.rigs import FloatArray, Rig, float_rig
from tests.support.served import random_requests, serve

ROOMY, CHUNK = 1 << 30, 16
REQUESTS = random_requests(SHAPES["smoke"].vocab_size, [(20, 3), (2, 5), (9, 2), (30, 3), (1, 4)], [{}])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with float_rig(tmp_path_factory.mktemp("device"), CHUNK, 4) as rig:
        yield rig


def served(rig: Rig, ram: Placement) -> list[FloatArray]:
    """Logits of every request."""
    with rig.running(ram) as forward:
        found = serve(forward, REQUESTS, seed=1)
    assert found.num_mixed > 2 and found.num_with_holes > 2
    return [np.stack(found.logits[i]) for i in range(len(REQUESTS))]


@pytest.mark.parametrize("moves_kv", [False, True])
@pytest.mark.parametrize("num_streamed", [0, 4])
def test_mixed_passes_on_a_device(rig: Rig, device: ComputeDevice, num_streamed: int, moves_kv: bool) -> None:
    on_cpu = served(rig, rig.all_resident())
    demand = rig.device_demand(device, ROOMY, CHUNK)
    whole = rig.on_device(device, next(place_on_device(demand)))
    want = served(whole, place(whole.demand(1 << 50)))
    there = rig.on_device(device, split(demand, num_streamed, 0, moves_kv=moves_kv))
    tight = place(replace(there.demand(), limit_bytes=smallest_bytes(there.demand())))
    got = served(there, tight)
    for rows, expected, reference in zip(got, want, on_cpu, strict=True):
        assert relative_error(expected, reference) < 16 * 2**-11
        np.testing.assert_array_equal(rows, expected)


def test_a_hidden_state_comes_from_the_device(rig: Rig, device: ComputeDevice) -> None:
    with rig.running(rig.all_resident()) as forward:
        want = forward.embed(REQUESTS[0].prompt)
    there = rig.on_device(device, next(place_on_device(rig.device_demand(device, ROOMY, CHUNK))))
    with there.running(place(there.demand(1 << 50))) as forward:
        assert not forward.can_copy_rows
        assert relative_error(forward.embed(REQUESTS[0].prompt, sequence=1), want) < 16 * 2**-11
