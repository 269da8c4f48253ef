"""Several sequences in one pass: each gets what it would get alone, wherever the weights live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.random_mixture import write_random_mixture
from bench.random_model import SHAPES, write_random_model
from pipo.base.config import SCHEDULE_NAMES, EngineConfig
from pipo.base.errors import ContextOverflow, UsageError
from pipo.generation.request import FinishReason, SamplingParams
from pipo.pipeline.forward import Forward
from tests.support.engines import PLENTY, smallest_ram_bytes, start_engine
from tests.support.rigs import FloatArray, Rig, read_prompts

CHUNK = 16
LENGTHS = (5, 300, 1, 40, 37)  # of the prompts: two classes of KV length, one of them crossed while decoding
NUM_NEW = 6
RANDOM = np.random.default_rng(5)
PROMPTS = [[int(t) for t in RANDOM.integers(3, SHAPES["smoke"].vocab_size, length)] for length in LENGTHS]


@pytest.fixture(scope="module", params=["plain", "repacked", "mixture"])
def rig(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Rig]:
    path = tmp_path_factory.mktemp("random") / "smoke.gguf"
    if request.param == "mixture":
        write_random_mixture(path, "smoke-moe")
    else:
        write_random_model(path, "smoke", "q4_0")
    layout = "auto" if request.param == "mixture" else request.param
    config = EngineConfig(layout=layout, prefill_chunk=CHUNK, threads=1, num_sequences=len(PROMPTS))
    with Rig(path, config, context_tokens=320) as rig:
        if request.param == "repacked" and not rig.blueprint.layouts.repacked:
            pytest.skip("this CPU has no repacked kernels")
        yield rig


def together(forward: Forward) -> FloatArray:
    """Greedy answers to all prompts in common passes. Shape: (1 + NUM_NEW, prompts, vocab)."""
    rows = [read_prompts(forward, PROMPTS, CHUNK)]
    for i in range(NUM_NEW):
        tokens = [int(row.argmax()) for row in rows[-1]]
        rows.append(forward.run_batch(tokens, [len(prompt) + i for prompt in PROMPTS]).copy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def resident(rig: Rig) -> FloatArray:
    with rig.running(rig.all_resident()) as forward:
        return together(forward)


def test_each_sequence_gets_what_it_gets_alone(rig: Rig, resident: FloatArray) -> None:
    """Products of a row and attention of one query do not depend on who else is there; but for those with a router,
    which is F32: some CPUs have another kernel for one row of that than for several.
    """
    tolerance = 2e-3 if rig.blueprint.experts else 1e-4
    with rig.running(rig.all_resident()) as forward:
        for sequence, prompt in enumerate(PROMPTS):
            for start in range(0, len(prompt), CHUNK):
                found = forward.run(prompt[start : start + CHUNK], start, [len(prompt[start : start + CHUNK]) - 1])
            rows = [found[0].copy()]
            for i in range(NUM_NEW):
                token = int(resident[i, sequence].argmax())
                rows.append(forward.run([token], len(prompt) + i, [0])[0].copy())
            np.testing.assert_allclose(np.stack(rows), resident[:, sequence], rtol=tolerance, atol=tolerance)
            forward.forget()


@pytest.mark.parametrize("budget", [0, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_streamed_batches_are_resident_ones_bit_for_bit(
    rig: Rig, resident: FloatArray, schedule: str, budget: int
) -> None:
    with rig.running(rig.placements(6)[budget], schedule=schedule) as forward:
        for _ in range(2):
            forward.forget()
            np.testing.assert_array_equal(together(forward).view(np.uint32), resident.view(np.uint32))


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_every_cache_type(rig: Rig, kind: str) -> None:
    typed = replace(rig.blueprint.config, cache_type_k=kind, cache_type_v=kind)
    blueprint, rig.blueprint = rig.blueprint, replace(rig.blueprint, config=typed)
    try:
        with rig.running(rig.all_resident()) as forward:
            want = together(forward)
        with rig.running(rig.placements(3)[0]) as forward:
            np.testing.assert_array_equal(together(forward).view(np.uint32), want.view(np.uint32))
    finally:
        rig.blueprint = blueprint


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEXTS = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time there was a little girl who"]


@pytest.mark.parametrize("is_tight", [True, False])
def test_answers_are_those_of_one_at_a_time(smollm2_path: Path, is_tight: bool) -> None:
    settings = {"context_tokens": 64, "prefill_chunk": 16, "num_sequences": 3}
    ram_bytes = smallest_ram_bytes(smollm2_path, **settings) if is_tight else PLENTY
    with start_engine(smollm2_path, ram_bytes=ram_bytes, **settings) as engine:
        prompts = [engine.encode(text) for text in TEXTS]
        alone = [engine.complete(prompt, GREEDY) for prompt in prompts]
        batch = engine.complete_batch(prompts, GREEDY)
        assert engine.report is not None and engine.report.num_generated == len(prompts) * (GREEDY.max_tokens or 0)
        assert [each.text for each in batch] == [each.text for each in alone]
        assert [each.usage for each in batch] == [replace(each.usage, cached_tokens=0) for each in alone]
        again = engine.complete(prompts[0], GREEDY)
    assert again.text == alone[0].text and again.usage.cached_tokens == 0, "a batch leaves nothing behind"


def test_sequences_end_one_by_one(smollm2_path: Path) -> None:
    lengths = (9, 2, 5)
    params = [replace(GREEDY, max_tokens=length) for length in lengths]
    with start_engine(smollm2_path, num_sequences=3, context_tokens=64) as engine:
        prompts = [engine.encode(text) for text in TEXTS]
        batch = engine.complete_batch(prompts, params)
        want = [engine.complete(prompt, each).text for prompt, each in zip(prompts, params, strict=True)]
    assert tuple(each.usage.completion_tokens for each in batch) == lengths
    assert {each.finish_reason for each in batch} == {FinishReason.LENGTH}
    assert [each.text for each in batch] == want


def test_what_does_not_fit_is_refused_before_any_work(smollm2_path: Path) -> None:
    with start_engine(smollm2_path, num_sequences=2, context_tokens=64) as engine:
        prompt = engine.encode(TEXTS[0])
        with pytest.raises(UsageError, match="1 prompts with 2 parameters"):
            engine.complete_batch([prompt], [GREEDY] * 2)
        with pytest.raises(ContextOverflow):
            engine.complete_batch([prompt, prompt * 20], GREEDY)
        assert engine.complete_batch([prompt], GREEDY)[0].text and engine.complete_batch([], GREEDY) == []
