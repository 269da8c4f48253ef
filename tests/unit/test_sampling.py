"""Sampling against plain loops, analytic probabilities and hand-made cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipo.base.errors import ComputeError, UsageError
from pipo.generation.request import SamplingParams
from pipo.generation.sampling import Floats, Sampler, keep_min_p, keep_top_k, keep_top_p, penalised

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits_of(seed: int, size: int = 50, *, has_ties: bool = False) -> Floats:
    values = np.random.default_rng(seed).normal(0, 2, size)
    return (values.round() if has_ties else values).astype(np.float32)


def loop_probs(values: Sequence[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def loop_best_first(values: Floats) -> list[int]:
    return sorted(range(len(values)), key=lambda idx: (-values[idx], idx))


def loop_top_k(values: Floats, k: int) -> list[int]:
    return sorted(loop_best_first(values)[:k])


def loop_top_p(values: Floats, p: float) -> list[int]:
    probs, kept, reached = loop_probs(values.tolist()), [], 0.0
    for idx in loop_best_first(values):
        kept.append(idx)
        reached += probs[idx]
        if reached >= p:
            break
    return sorted(kept)


def loop_min_p(values: Floats, p: float) -> list[int]:
    probs = loop_probs(values.tolist())
    return [idx for idx, prob in enumerate(probs) if prob >= p * max(probs)]


def loop_penalised(logits: Floats, history: Sequence[int], params: SamplingParams) -> list[float]:
    recent = list(history) if params.repeat_last_n == -1 else list(history)[len(history) - params.repeat_last_n :]
    scores = [float(logit) for logit in logits]
    for token in set(recent):
        scores[token] *= params.repeat_penalty if scores[token] <= 0 else 1 / params.repeat_penalty
        scores[token] -= recent.count(token) * params.frequency_penalty + params.presence_penalty
    return scores


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("k", [1, 7, 49, 50, 60])
def test_top_k_is_the_loops(k: int, has_ties: bool) -> None:
    for seed in range(10):
        values = logits_of(seed, has_ties=has_ties)
        assert keep_top_k(values, k).tolist() == loop_top_k(values, k)


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_is_the_loops(p: float, has_ties: bool) -> None:
    for seed in range(10):
        values = logits_of(seed, has_ties=has_ties)
        assert keep_top_p(values, p).tolist() == loop_top_p(values, p)


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_is_the_loops(p: float) -> None:
    for seed in range(10):
        values = logits_of(seed)
        assert keep_min_p(values, p).tolist() == loop_min_p(values, p)


@pytest.mark.parametrize("last_n", [-1, 1, 5, 64])
def test_penalties_are_the_loops(last_n: int) -> None:
    params = SamplingParams(
        repeat_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2, repeat_last_n=last_n, temperature=0
    )
    for seed in range(10):
        logits = logits_of(seed)
        history = np.random.default_rng(seed).integers(0, 50, 20).tolist()
        # float32 keeps 2^-24 of values below 16
        assert penalised(logits, history, params) == pytest.approx(loop_penalised(logits, history, params), abs=2e-6)
        assert Sampler(params).sample(logits, history).token_id == np.argmax(loop_penalised(logits, history, params))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1, "temperature": 1.5},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    ],
)
def test_draws_follow_the_analytic_distribution(changes: dict[str, Any]) -> None:
    """Each count is binomial: within five deviations, plus one draw, for 50 tokens and a fixed seed."""
    num_draws, logits = 20_000, logits_of(3)
    params = SamplingParams(**{**PLAIN, **changes}, seed=11)
    want = expected_probs(logits, params)
    sampler = Sampler(params)
    counts = np.bincount([sampler.sample(logits, ()).token_id for _ in range(num_draws)], minlength=50)
    deviation = np.sqrt(num_draws * want * (1 - want))
    assert (np.abs(counts - num_draws * want) <= 5 * deviation + (want > 0)).all()


def expected_probs(logits: Floats, params: SamplingParams) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The filters one after the other, each on what the one before left."""
    ids = list(range(len(logits)))
    if params.top_k > 0:
        ids = [ids[idx] for idx in loop_top_k(logits[ids], params.top_k)]
    if params.top_p < 1:
        ids = [ids[idx] for idx in loop_top_p(logits[ids], params.top_p)]
    if params.min_p > 0:
        ids = [ids[idx] for idx in loop_min_p(logits[ids], params.min_p)]
    probs = np.zeros(len(logits))
    probs[ids] = loop_probs(logits[ids].tolist(), params.temperature)
    return probs


def test_greedy_takes_the_lowest_of_ties() -> None:
    logits = np.array([1, 5, 5, 0], dtype=np.float32)
    assert Sampler(SamplingParams(temperature=0)).sample(logits, ()).token_id == 1
    assert Sampler(SamplingParams(top_k=1)).sample(logits, ()).token_id == 1
    assert Sampler(SamplingParams(top_p=0.0, top_k=0)).sample(logits, ()).token_id == 1


def test_same_seed_same_tokens() -> None:
    logits = logits_of(0, size=1000)
    runs = []
    for seed in (5, 5, 6):
        sampler = Sampler(SamplingParams(**{**PLAIN, "seed": seed}))
        runs.append([sampler.sample(logits, ()).token_id for _ in range(20)])
    assert runs[0] == runs[1] != runs[2]


def test_a_drawn_seed_can_be_used_again() -> None:
    logits, first = logits_of(0, size=1000), Sampler(SamplingParams(**PLAIN))
    again = Sampler(SamplingParams(**PLAIN, seed=first.seed))
    tokens = [[sampler.sample(logits, ()).token_id for _ in range(20)] for sampler in (first, again)]
    assert tokens[0] == tokens[1]


def test_tiny_temperature_and_excluded_tokens() -> None:
    logits = np.array([-np.inf, 3.0, 2.9, -np.inf], dtype=np.float32)
    cold = Sampler(SamplingParams(**{**PLAIN, "temperature": 1e-6, "seed": 0}))
    warm = Sampler(SamplingParams(**{**PLAIN, "temperature": 100.0, "seed": 0}))
    assert {cold.sample(logits, ()).token_id for _ in range(100)} == {1}
    assert {warm.sample(logits, ()).token_id for _ in range(100)} == {1, 2}


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(1, has_ties=True)
    params = SamplingParams(temperature=0.1, top_k=3, repeat_penalty=2.0, logprobs=5, seed=0)
    sampled = Sampler(params).sample(logits, [0, 1, 2])
    want = np.log(loop_probs(logits.tolist()))
    # float32 exponentials, each right to 2^-23, summed in float64
    assert sampled.logprob == pytest.approx(want[sampled.token_id], abs=1e-6)
    assert [token for token, _ in sampled.top] == loop_best_first(logits)[:5]
    assert [logprob for _, logprob in sampled.top] == pytest.approx(np.sort(want)[::-1][:5], abs=1e-6)


@pytest.mark.parametrize(("asked", "num_top"), [(None, 0), (0, 0), (3, 3), (99, 50)])
def test_as_many_alternatives_as_asked(asked: int | None, num_top: int) -> None:
    sampled = Sampler(SamplingParams(temperature=0, logprobs=asked)).sample(logits_of(2), ())
    assert (sampled.logprob is None) == (asked is None)
    assert len(sampled.top) == num_top


def test_logits_are_not_altered() -> None:
    logits = logits_of(4)
    before = logits.copy()
    logits.flags.writeable = False
    Sampler(SamplingParams(repeat_penalty=1.5, logprobs=3)).sample(logits, [1, 2, 3])
    assert (logits == before).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_damaged_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of(0)
    logits[17] = bad
    with pytest.raises(ComputeError, match="token 17 of 50") as caught:
        Sampler(SamplingParams(temperature=temperature)).sample(logits, ())
    assert caught.value.hint is not None and "damaged" in caught.value.hint


def test_no_possible_token_is_an_error() -> None:
    with pytest.raises(ComputeError, match="-inf"):
        Sampler(SamplingParams()).sample(np.full(5, -np.inf, dtype=np.float32), ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "0.8"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("repeat_last_n", -2),
        ("seed", -1),
        ("seed", True),
        ("stop", "abc"),
        ("stop", ("a", "")),
        ("stop", ("a", 1)),
        ("logprobs", -1),
    ],
)
def test_a_bad_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{field} must"):
        SamplingParams(**{field: value})


def test_defaults_are_llama_cpps() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert not params.has_penalties
    assert not params.is_greedy
