"""Mixtures whose attention and shared experts compute on a device: routed experts stay the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pipo.base.config import EngineConfig
from pipo.compute.device import ComputeDevice
from pipo.planner.device_placement import DevicePlacement, place_on_device
from pipo.planner.placement import Placement, place, smallest_bytes
from pipo.planner.schedule import SCHEDULES
from tests.support.rigs import FloatArray, Rig, all_logits, read_prompts
from tests.support.tiny_models import SPECS, make_model, reference_logits, write_gguf

CHUNK, ROOMY = 24, 1 << 30
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, SPECS["olmoe"].vocab_size, 60)]
PROMPTS = [TOKENS[40:43], TOKENS[:30], TOKENS[43:]]
MAX_ERROR = 1e-2  # a device may round what it multiplies to F16: 2^-11, in three blocks


@pytest.fixture(scope="module", params=["mixtral", "olmoe", "qwen2moe", "gpt-oss"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, family: str) -> Iterator[Rig]:
    path = tmp_path_factory.mktemp("device") / f"{family}.gguf"
    write_gguf(make_model(SPECS[family]), path)
    config = EngineConfig(
        threads=1, prefill_chunk=CHUNK, max_outputs=CHUNK, cache_type_k="f32", cache_type_v="f32", num_sequences=3
    )
    with Rig(path, config) as rig:
        yield rig


@pytest.fixture(scope="module")
def placements(rig: Rig, device: ComputeDevice) -> list[DevicePlacement]:
    """With little memory and with plenty."""
    roomy = rig.device_demand(device, ROOMY, CHUNK)
    most = next(place_on_device(roomy)).num_bytes
    found = [
        each for percent in (75, 100) for each in place_on_device(replace(roomy, limit_bytes=most * percent // 100))
    ]
    return list({(each.computes, each.resident, each.kv_sequences): each for each in found}.values())


def answers(rig: Rig, ram: Placement, schedule: str = "pipelined") -> list[FloatArray]:
    """Logits of every token of one sequence, in chunks and one by one, and of three sequences in common passes."""
    with rig.running(ram, schedule=schedule) as forward:
        after_prompts = read_prompts(forward, PROMPTS, CHUNK)
        batch = forward.run_batch([20, 30, 40], [len(prompt) for prompt in PROMPTS]).copy()
        single = all_logits(forward, TOKENS[:5], 1)
        return [all_logits(forward, TOKENS, CHUNK), single, after_prompts, batch]


def rams(rig: Rig) -> list[Placement]:
    """The least, and one with room for a third of the experts."""
    demand = rig.demand(1 << 50)
    (slots,) = place(demand).expert_slots
    few = replace(place(demand), expert_slots=(replace(slots, num_slots=slots.num_slots // 3),))
    return [place(replace(demand, limit_bytes=smallest_bytes(demand))), few]


@pytest.fixture(scope="module")
def whole(rig: Rig, device: ComputeDevice) -> list[FloatArray]:
    """All of the device's part stays there, and all experts are in RAM."""
    there = rig.on_device(device, next(place_on_device(rig.device_demand(device, ROOMY, CHUNK))))
    return answers(there, place(there.demand(1 << 50)))


def relative_error(got: FloatArray, want: FloatArray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_device_computes_what_transformers_does(whole: list[FloatArray], family: str) -> None:
    chunks, single, after_prompts, _ = whole
    want = reference_logits(make_model(SPECS[family]), TOKENS)
    assert relative_error(chunks, want) < MAX_ERROR
    assert relative_error(single, want[:5]) < MAX_ERROR
    assert relative_error(after_prompts[1], want[29]) < MAX_ERROR


def test_batches_are_what_the_cpu_computes(rig: Rig, whole: list[FloatArray]) -> None:
    for got, want in zip(whole, answers(rig, rig.all_resident()), strict=True):
        assert relative_error(got, want) < MAX_ERROR


def test_every_placement_where_all_blocks_are_the_devices(
    rig: Rig, device: ComputeDevice, placements: list[DevicePlacement], whole: list[FloatArray]
) -> None:
    """The same bits, whatever stays there or passes through, and however few experts fit in RAM."""
    ours = [each for each in placements if each.is_all]
    assert len(ours) > 3
    for i, placement in enumerate(ours):
        there = rig.on_device(device, placement)
        for got, want in zip(answers(there, rams(there)[i % 2]), whole, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_sides_share_the_blocks(
    rig: Rig, device: ComputeDevice, placements: list[DevicePlacement], whole: list[FloatArray], schedule: str
) -> None:
    shared = [each for each in placements if not each.is_all]
    assert shared
    for placement in shared:
        there = rig.on_device(device, placement)
        for got, want in zip(answers(there, rams(there)[0], schedule), whole, strict=True):
            assert relative_error(got, want) < MAX_ERROR


def test_the_ledger_of_the_device_is_what_is_taken(rig: Rig, device: ComputeDevice) -> None:
    placement = next(place_on_device(rig.device_demand(device, ROOMY, CHUNK)))
    there = rig.on_device(device, placement)
    with there.running(place(there.demand(1 << 50))) as forward:
        all_logits(forward, TOKENS, CHUNK)
        assert placement.num_bytes * 0.9 <= device.held_bytes <= placement.num_bytes
    assert device.held_bytes == 0
