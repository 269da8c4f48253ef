"""Where a weight lives, how it comes there and in which order: the logits are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.random_model import SHAPES, write_random_model
from pipo.base.clock import RealClock
from pipo.base.config import CACHE_TYPE_NAMES, SCHEDULE_NAMES, EngineConfig
from pipo.generation.loop import Generator
from pipo.generation.request import Sampled, SamplingParams
from pipo.pipeline import stage_graphs
from pipo.planner.placement import SlotClass
from pipo.transfer.disk import DriveSettings
from tests.support.rigs import SMALL_CHUNKS, FloatArray, Rig, all_logits, transcript

NUM_BUDGETS = 7
CHUNK = 8
PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, SHAPES["smoke"].vocab_size, 2 * CHUNK + 3)]
NUM_NEW = 3


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 blocks: an attention unit has 110 KiB, an MLP 324 KiB, the head 210 KiB. Q4_0, the head Q6_K."""
    path = tmp_path_factory.mktemp("random") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    return path


@pytest.fixture(scope="module", params=["plain", "repacked"])
def rig(random_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    config = EngineConfig(layout=request.param, prefill_chunk=CHUNK, max_outputs=CHUNK, threads=1)
    with Rig(random_path, config) as rig:
        if request.param == "repacked" and not rig.blueprint.layouts.repacked:
            pytest.skip("this CPU has no repacked kernels")
        yield rig


@pytest.fixture(scope="module")
def resident(rig: Rig) -> FloatArray:
    with rig.running(rig.all_resident()) as forward:
        return transcript(forward, PROMPT, CHUNK, NUM_NEW)


def assert_same_bits(got: FloatArray, want: FloatArray) -> None:
    assert np.isfinite(want).all() and want.std() > 0.5
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_budgets_range_from_nothing_to_everything_resident(rig: Rig) -> None:
    placements = rig.placements(NUM_BUDGETS)
    assert not any(placements[0].resident) and all(placements[-1].resident)
    assert len({placement.resident for placement in placements}) == NUM_BUDGETS >= 6


@pytest.mark.parametrize("budget", range(NUM_BUDGETS))
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_every_budget_and_schedule(rig: Rig, resident: FloatArray, schedule: str, budget: int) -> None:
    placement = rig.placements(NUM_BUDGETS)[budget]
    with rig.running(placement, schedule=schedule) as forward:
        assert_same_bits(transcript(forward, PROMPT, CHUNK, NUM_NEW), resident)
        cold = forward.take_stats()
        assert_same_bits(transcript(forward, PROMPT, CHUNK, NUM_NEW), resident)
        warm = forward.take_stats()
    assert cold.num_passes == warm.num_passes == 3 + NUM_NEW
    assert (warm.bytes_read > 0) == (placement.streamed_bytes > 0)


@pytest.mark.parametrize(
    "drive",
    [
        DriveSettings(chunk_bytes=4096, num_workers=1),
        DriveSettings(chunk_bytes=20480, num_workers=5),
        DriveSettings(chunk_bytes=4 << 20, num_workers=2),
        replace(SMALL_CHUNKS, direct=False),
    ],
    ids=str,
)
def test_every_way_to_read_the_drive(rig: Rig, resident: FloatArray, drive: DriveSettings) -> None:
    with rig.running(rig.placements(NUM_BUDGETS)[1], drive=drive) as forward:
        assert_same_bits(transcript(forward, PROMPT, CHUNK, NUM_NEW), resident)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("slot_bytes", [24 << 10, 40 << 10, 132 << 10, 256 << 10])
def test_head_streamed_in_pieces(rig: Rig, slot_bytes: int, num_slots: int) -> None:
    """16 pieces to 1, with logits of one position and of several."""
    whole = rig.all_resident()
    resident_but_head = (*whole.resident[:-1], False)
    slots = (SlotClass(0, 0), SlotClass(slot_bytes, num_slots))
    placement = replace(whole, resident=resident_but_head, slots=slots, streamed_bytes=1)
    with rig.running(whole) as forward:
        want = all_logits(forward, PROMPT, CHUNK), transcript(forward, PROMPT, CHUNK, 1)
    with rig.running(placement) as forward:
        assert_same_bits(all_logits(forward, PROMPT, CHUNK), want[0])
        forward.take_stats()
        assert_same_bits(transcript(forward, PROMPT, CHUNK, 1), want[1])
        num_pieces = forward.take_stats().num_reads / 2
    assert num_pieces >= 210 * 1024 // slot_bytes


def test_more_threads_than_one_change_nothing(random_path: Path, rig: Rig, resident: FloatArray) -> None:
    config = replace(rig.blueprint.config, threads=2)
    with Rig(random_path, config) as double, double.running(double.placements(3)[1]) as forward:
        assert_same_bits(transcript(forward, PROMPT, CHUNK, NUM_NEW), resident)


@pytest.mark.parametrize("budget", [0, NUM_BUDGETS - 1])
def test_more_kinds_of_stages_than_graphs_are_kept(
    rig: Rig, resident: FloatArray, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """As in a model whose blocks all differ in types: a graph that was given up is built again, never used."""
    monkeypatch.setattr(stage_graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(stage_graphs, "MAX_WHOLE_GRAPHS", 1)
    with rig.running(rig.placements(NUM_BUDGETS)[budget]) as forward:
        for _ in range(2):
            assert_same_bits(transcript(forward, PROMPT, CHUNK, NUM_NEW), resident)


@pytest.mark.parametrize("kind", CACHE_TYPE_NAMES)
def test_every_cache_type(random_path: Path, kind: str) -> None:
    config = EngineConfig(cache_type_k=kind, cache_type_v=kind, prefill_chunk=CHUNK, threads=1)
    with Rig(random_path, config) as rig:
        with rig.running(rig.all_resident()) as forward:
            want = transcript(forward, PROMPT, CHUNK, NUM_NEW)
        with rig.running(rig.placements(3)[0]) as forward:
            assert_same_bits(transcript(forward, PROMPT, CHUNK, NUM_NEW), want)


def test_long_prompts_in_wide_chunks(random_path: Path) -> None:
    """Beyond 64 queries and beyond 512 rows of KV, where ggml's attention takes other paths."""
    prompt = [3 + i * 7 % 1000 for i in range(540)]
    with Rig(random_path, EngineConfig(prefill_chunk=96, threads=1), context_tokens=600) as rig:
        with rig.running(rig.all_resident()) as forward:
            want = transcript(forward, prompt, 96, NUM_NEW)
        with rig.running(rig.placements(3)[0]) as forward:
            assert_same_bits(transcript(forward, prompt, 96, NUM_NEW), want)


class _NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _answer(generator: Generator, prompt: list[int]) -> list[Sampled | None]:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
    return [piece.token for piece in generator.generate(prompt, params, frozenset(), _NoText())]


@pytest.mark.parametrize("budget", [0, 3, NUM_BUDGETS - 1])
def test_shared_prefix_from_the_cache(rig: Rig, budget: int) -> None:
    """The second prompt shares two whole chunks with the first: what is left is cut as it would be from the start."""
    shared, placement = PROMPT[: 2 * CHUNK], rig.placements(NUM_BUDGETS)[budget]
    first, second = [*shared, 100, 101, 102], [*shared, *range(200, 200 + CHUNK + 1)]
    answers = []
    for prompts in ([first, second], [second]):
        with rig.running(placement) as forward:
            vocab_size = rig.blueprint.manifest.hyper.vocab_size
            generator = Generator(forward, vocab_size, rig.context_tokens, RealClock())
            answers.append([_answer(generator, prompt) for prompt in prompts][-1])
            assert generator.timing.cached_tokens == (2 * CHUNK if len(prompts) == 2 else 0)
    assert answers[0] == answers[1] and None not in answers[0]


@pytest.fixture(scope="module")
def smollm2_rig(smollm2_path: Path) -> Iterator[Rig]:
    """Q4_1, which has no repacked kernels; the head is the embedding table: 28 MB of Q8_0, in 18 pieces."""
    drive = DriveSettings(chunk_bytes=1 << 20, num_workers=4)
    with Rig(smollm2_path, EngineConfig(prefill_chunk=16, threads=1), drive=drive) as rig:
        yield rig


@pytest.fixture(scope="module")
def smollm2_resident(smollm2_rig: Rig) -> FloatArray:
    with smollm2_rig.running(smollm2_rig.all_resident()) as forward:
        return transcript(forward, list(range(1000, 1020)), 16, 2)


@pytest.mark.parametrize(
    ("schedule", "budget"), [("pipelined", i) for i in range(6)] + [(s, i) for s in SCHEDULE_NAMES[1:] for i in (0, 3)]
)
def test_smollm2(smollm2_rig: Rig, smollm2_resident: FloatArray, schedule: str, budget: int) -> None:
    placement = smollm2_rig.placements(6)[budget]
    with smollm2_rig.running(placement, schedule=schedule) as forward:
        assert_same_bits(transcript(forward, list(range(1000, 1020)), 16, 2), smollm2_resident)
        assert forward.take_stats().bytes_read >= placement.streamed_bytes * 3
