"""generation.batcher: prompts whose tokens' log-probabilities are wanted, between answers to others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipo.base.errors import Cancelled, ComputeError, ReadFailed, UsageError
from pipo.generation.events import RequestId
from pipo.generation.request import GenerationRequest, Sampled, SamplingParams
from tests.support.arithmetic_passes import VOCAB, ArithmeticPasses, answer_alone, logits_after
from tests.support.batching import Bench

FAILED = ReadFailed("could not read", path="model", offset=0, wanted_bytes=1, got_bytes=0)


def prompt_of(length: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(length).integers(1, VOCAB, length)]


def scored(bench: Bench, number: int) -> list[Sampled]:
    return [each for piece in bench.pieces[number] for each in piece.scored]


def logprobs_of(tokens: Sequence[int]) -> list[float]:
    """Of each token but the first, after those before it."""
    rows, found = [(token, "{}") for token in tokens], []
    for i in range(1, len(tokens)):
        logits = logits_after(rows[:i]).astype(np.float64)
        found.append(float(logits[tokens[i]] - np.log(np.exp(logits).sum())))
    return found


@pytest.mark.parametrize("max_tokens", [5, 64])
def test_prompts_are_scored_between_answers(max_tokens: int) -> None:
    bench = Bench(ArithmeticPasses(3, max_tokens))
    prompts = [prompt_of(length) for length in (30, 1, 2, 33)]
    bench.submit(9, prompts[0], max_tokens=20, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        bench.submit(number, prompt, scores_prompt=True, logprobs=2, max_tokens=4, ignore_eos=True)
    for _ in range(8):
        bench.step()
    assert bench.pieces[9] and 0 not in bench.ends, "nobody waits for all of a prompt that is scored"
    bench.run()
    want = answer_alone(prompts[0], 20)
    assert bench.tokens(9)[: len(want)] == want and len(bench.tokens(9)) == 20
    for number, prompt in enumerate(prompts):
        first, *found = scored(bench, number)
        assert first == Sampled(prompt[0]), "it comes after nothing"
        assert [each.token_id for each in found] == prompt[1:]
        assert [each.logprob for each in found] == pytest.approx(logprobs_of(prompt), abs=1e-5)
        assert all(len(each.top) == 2 and each.top[0][1] >= (each.logprob or 0) for each in found)
        assert len(bench.tokens(number)) == 4 and bench.summary(number).usage.cached_tokens == 0


def test_what_was_scored_is_known_to_those_that_come_later() -> None:
    prompt = prompt_of(30)
    bench = Bench(ArithmeticPasses(2, max_tokens=8))
    bench.submit(0, prompt, scores_prompt=True, logprobs=0, max_tokens=1)
    bench.run()
    bench.submit(1, prompt, max_tokens=4)
    bench.submit(2, prompt, scores_prompt=True, logprobs=0, max_tokens=1)
    bench.run()
    assert bench.tokens(1) == answer_alone(prompt, 4) and bench.summary(1).usage.cached_tokens == 29
    assert scored(bench, 2) == scored(bench, 0), "but is scored again"


def test_one_that_is_cancelled_leaves_and_the_others_go_on() -> None:
    prompt = prompt_of(30)
    bench = Bench(ArithmeticPasses(2, max_tokens=8))
    bench.submit(0, prompt, scores_prompt=True, logprobs=0)
    bench.step()
    bench.batcher.cancel(RequestId(0))
    bench.submit(1, prompt, max_tokens=4)
    bench.run()
    assert isinstance(bench.ends[0], Cancelled) and bench.tokens(1) == answer_alone(prompt, 4)


def test_one_that_fails_is_scored_from_its_first_token_the_next_time() -> None:
    prompt, errors = prompt_of(30), iter([None, None, FAILED])
    bench = Bench(ArithmeticPasses(2, max_tokens=8, fails=lambda: next(errors, None)))
    bench.submit(0, prompt, scores_prompt=True, logprobs=0)
    bench.run()
    assert bench.ends[0] is FAILED and 1 < len(scored(bench, 0)) < len(prompt)
    bench.submit(1, prompt, scores_prompt=True, logprobs=0, max_tokens=1)
    bench.run()
    assert [each.token_id for each in scored(bench, 1)] == prompt


def test_bad_logits_end_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=8))
    bench.submit(0, prompt_of(30), max_tokens=12, ignore_eos=True)
    bench.submit(1, prompt_of(20), scores_prompt=True, logprobs=0)

    def broken(*arguments: object) -> list[np.ndarray]:
        return [np.full(VOCAB, np.nan, np.float32)] * 2

    monkeypatch.setattr(bench.passes, "run_rows", broken)
    bench.run()
    assert isinstance(bench.ends[1], ComputeError) and len(bench.tokens(0)) == 12


def test_alternatives_must_be_asked_for() -> None:
    with pytest.raises(UsageError, match="set logprobs"):
        GenerationRequest([1], SamplingParams(), scores_prompt=True)
