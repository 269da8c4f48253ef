"""Several sequences in a pass on a device: each gets what the CPU gives it, wherever weights and keys live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pipo.compute.device import ComputeDevice
from pipo.planner.device_placement import place_on_device
from pipo.planner.placement import Placement, place, smallest_bytes
from tests.gpu.test_device_engine import relative_error, split
from tests.support.rigs import FloatArray, Rig, float_rig, read_prompts

CHUNK, NUM_NEW, ROOMY = 16, 3, 1 << 30
PROMPTS = [list(range(5, 45)), [7, 8, 9], list(range(100, 117))]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with float_rig(tmp_path_factory.mktemp("device"), CHUNK, 3) as rig:
        yield rig


def together(rig: Rig, ram: Placement) -> FloatArray:
    """Logits after every prompt, and of the tokens that the CPU would choose. Shape: (1 + NUM_NEW, prompts, vocab)."""
    with rig.running(ram) as forward:
        after_prompts = read_prompts(forward, PROMPTS, CHUNK)
        ends = [len(prompt) for prompt in PROMPTS]
        answers = [
            forward.run_batch([20 + i, 30 + i, 40 + i], [end + i for end in ends]).copy() for i in range(NUM_NEW)
        ]
        return np.stack([after_prompts, *answers])


@pytest.mark.parametrize("moves_kv", [False, True])
@pytest.mark.parametrize("num_streamed", [0, 2, 4])
def test_batches_on_a_device(rig: Rig, device: ComputeDevice, num_streamed: int, moves_kv: bool) -> None:
    on_cpu = together(rig, rig.all_resident())
    demand = rig.device_demand(device, ROOMY, CHUNK)
    whole = rig.on_device(device, next(place_on_device(demand)))
    want = together(whole, place(whole.demand(1 << 50)))
    assert relative_error(want, on_cpu) < 16 * 2**-11
    there = rig.on_device(device, split(demand, num_streamed, 0, moves_kv=moves_kv))
    tight = place(replace(there.demand(), limit_bytes=smallest_bytes(there.demand())))
    np.testing.assert_array_equal(together(there, tight), want)
