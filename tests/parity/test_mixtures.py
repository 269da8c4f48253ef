"""However many experts fit, whoever is read ahead and whoever has to go: the logits are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.random_mixture import SHAPES, write_random_mixture
from pipo.base.config import SCHEDULE_NAMES, EngineConfig
from pipo.planner.placement import Placement
from pipo.transfer.disk import DriveSettings
from tests.support.rigs import FloatArray, Rig, all_logits, transcript

NUM_BUDGETS, NUM_NEW = 6, 5
SHAPE = SHAPES["smoke-moe"]
CHUNKS = (8, 40)  # results of experts kept apart until all are there; added in order
PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, SHAPE.vocab_size, 95)]


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 blocks of 16 experts of 27 KiB, of which a token passes 4."""
    path = tmp_path_factory.mktemp("random") / "smoke-moe.gguf"
    write_random_mixture(path, "smoke-moe")
    return path


@pytest.fixture(scope="module", params=["plain", "repacked"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=CHUNKS)
def rig(random_path: Path, layout: str, request: pytest.FixtureRequest) -> Iterator[Rig]:
    config = EngineConfig(layout=layout, prefill_chunk=request.param, max_outputs=8, threads=1)
    with Rig(random_path, config) as rig:
        if layout == "repacked" and not rig.blueprint.layouts.repacked:
            pytest.skip("this CPU has no repacked kernels")
        yield rig


def answer(
    rig: Rig, placement: Placement, schedule: str = "pipelined", drive: DriveSettings | None = None
) -> tuple[FloatArray, FloatArray]:
    chunk = rig.blueprint.config.prefill_chunk
    assert chunk is not None
    with rig.running(placement, schedule=schedule, drive=drive) as forward:
        return transcript(forward, PROMPT, chunk, NUM_NEW), all_logits(forward, PROMPT[:20], 8)


@pytest.fixture(scope="module")
def resident(rig: Rig) -> tuple[FloatArray, FloatArray]:
    return answer(rig, rig.all_resident())


def assert_same_bits(got: tuple[FloatArray, ...], want: tuple[FloatArray, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert np.isfinite(other).all() and other.std() > 0.1
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def with_experts(placement: Placement, num_slots: int) -> Placement:
    (slots,) = placement.expert_slots
    return replace(placement, expert_slots=(replace(slots, num_slots=num_slots),))


def test_budgets_range_from_one_tokens_experts_to_all(rig: Rig) -> None:
    placements = rig.placements(NUM_BUDGETS)
    counts = [placement.expert_slots[0].num_slots for placement in placements]
    assert counts[0] == SHAPE.num_experts_per_tok and counts[-1] == SHAPE.num_layers * SHAPE.num_experts
    assert counts == sorted(counts) and not placements[-1].misses_experts and placements[-2].misses_experts


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize("budget", range(NUM_BUDGETS))
def test_every_budget(rig: Rig, resident: tuple[FloatArray, FloatArray], budget: int, schedule: str) -> None:
    assert_same_bits(answer(rig, rig.placements(NUM_BUDGETS)[budget], schedule=schedule), resident)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 5, 15, 17, 63])
def test_every_number_of_slots(rig: Rig, resident: tuple[FloatArray, FloatArray], num_slots: int) -> None:
    """Fewer than a token needs, too: no plan has so few, and none would wait for itself."""
    assert_same_bits(answer(rig, with_experts(rig.all_resident(), num_slots)), resident)


def test_a_slow_drive(rig: Rig, resident: tuple[FloatArray, FloatArray]) -> None:
    drive = DriveSettings(chunk_bytes=4096, num_workers=1)
    assert_same_bits(answer(rig, with_experts(rig.all_resident(), 9), drive=drive), resident)


def test_experts_that_all_fit_are_read_once(rig: Rig) -> None:
    chunk = rig.blueprint.config.prefill_chunk or 0
    with rig.running(rig.all_resident()) as forward:
        for _ in range(3):
            transcript(forward, PROMPT, chunk, NUM_NEW)
        stats = forward.take_stats()
        assert stats.num_reads < len(rig.blueprint.unit_sizes) + SHAPE.num_layers * SHAPE.num_experts + 1
        assert stats.experts is not None
        transcript(forward, PROMPT, chunk, NUM_NEW)
        again = forward.take_stats()
    assert again.experts is not None and again.experts.total.num_missed == 0
    assert again.experts.total.num_needed > 0


def test_counts_add_up(rig: Rig) -> None:
    chunk = rig.blueprint.config.prefill_chunk or 0
    with rig.running(with_experts(rig.all_resident(), 24)) as forward:
        transcript(forward, PROMPT, chunk, 0)
        forward.take_stats()
        transcript(forward, PROMPT[:1], chunk, NUM_NEW)
        experts = forward.take_stats().experts
    assert experts is not None
    for i, block in enumerate(experts.blocks):
        assert block.num_needed == (1 + NUM_NEW) * SHAPE.num_experts_per_tok
        assert 0 <= block.num_right <= min(block.num_foretold, block.num_needed)
        assert (block.recall is None) == (i == 0)
        assert min(block.num_hits, block.num_missed, block.num_guessed) >= 0
    total = experts.total
    assert total.num_missed > 0 and total.num_guessed > 0 and (total.precision or 0) > 0.5
