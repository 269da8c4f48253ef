"""Tokens that are made likelier, less likely or forbidden before they are drawn; log-probabilities do not know it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipo.base.errors import UsageError
from pipo.generation.request import MAX_BIASED_TOKENS, SamplingParams
from pipo.generation.sampling import NOTHING_FOLLOWS, Floats, Sampler, biased

FORBID = -math.inf
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOGITS = np.random.default_rng(5).normal(0, 2, 60).astype(np.float32)


def test_it_is_added_to_the_named_logits_alone() -> None:
    before = LOGITS.copy()
    scores = biased(LOGITS, {3: 1.5, 7: -2.25, 9: FORBID})
    assert scores[[3, 7]].tolist() == pytest.approx([LOGITS[3] + 1.5, LOGITS[7] - 2.25])
    assert scores[9] == FORBID
    others = [i for i in range(60) if i not in (3, 7, 9)]
    assert (scores[others] == LOGITS[others]).all() and (before == LOGITS).all()


@pytest.mark.parametrize("bias", [1e300, -1e300, 3.4e38, -3.4e38])
def test_a_finite_bias_stays_finite(bias: float) -> None:
    scores = biased(LOGITS, {3: bias})
    assert math.isfinite(scores[3]) and math.copysign(1, scores[3]) == math.copysign(1, bias)


def test_what_a_model_forbids_stays_forbidden() -> None:
    logits = LOGITS.copy()
    logits[3] = FORBID
    assert biased(logits, {3: 100.0})[3] == FORBID


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_large_one_decides(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, logit_bias={int(LOGITS.argmin()): 100.0}, seed=1)
    assert Sampler(params).sample(LOGITS, ()).token_id == LOGITS.argmin()


def test_draws_follow_the_biased_distribution() -> None:
    """Each count is binomial: within five deviations, plus one draw."""
    num_draws, bias = 20_000, {0: 2.0, 1: -1.0, 2: FORBID, 3: 3.0}
    scores = LOGITS.astype(np.float64)
    for token_id, value in bias.items():
        scores[token_id] += value
    want = np.exp(scores) / np.exp(scores).sum()
    sampler = Sampler(SamplingParams(**PLAIN, logit_bias=bias, seed=11))
    counts = np.bincount([sampler.sample(LOGITS, ()).token_id for _ in range(num_draws)], minlength=60)
    deviation = np.sqrt(num_draws * want * (1 - want))
    assert (np.abs(counts - num_draws * want) <= 5 * deviation + (want > 0)).all()


def test_it_comes_before_penalties_as_in_llama_cpp() -> None:
    """A penalty divides what is above 0: 1 + 3 becomes 2, where 1 / 2 + 3 would be 3.5."""
    logits = np.array([1.0, 2.5], np.float32)
    params = SamplingParams(temperature=0, repeat_penalty=2.0, logit_bias={0: 3.0})
    assert Sampler(params).sample(logits, [0]).token_id == 1


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    forced = int(LOGITS.argmin())
    plain = Sampler(SamplingParams(temperature=0, logprobs=3)).sample(LOGITS, ())
    biased_one = Sampler(SamplingParams(temperature=0, logprobs=3, logit_bias={forced: 100.0})).sample(LOGITS, ())
    assert biased_one.top == plain.top
    total = math.log(float(np.exp(LOGITS.astype(np.float64)).sum()))
    assert biased_one.token_id == forced and biased_one.logprob == pytest.approx(
        float(LOGITS[forced]) - total, abs=1e-5
    )


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.5, "top_k": 0}, PLAIN]
)
@pytest.mark.parametrize("num_allowed", [1, 3])
def test_what_is_masked_is_never_among_the_candidates(settings: dict[str, Any], num_allowed: int) -> None:
    """Also where fewer are allowed than top-k keeps."""
    worst = np.argsort(LOGITS)[:num_allowed]

    def constrain(scores: Floats) -> Floats:
        masked = np.full_like(scores, FORBID)
        masked[worst] = scores[worst]
        return masked

    sampler = Sampler(SamplingParams(**settings, seed=3))
    chosen = {sampler.sample(LOGITS, (), constrain).token_id for _ in range(200)}
    assert chosen <= set(worst.tolist())
    assert len(chosen) == 1 or settings == PLAIN or num_allowed > 1


def test_nothing_left_is_said() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(60), FORBID))
    with pytest.raises(UsageError, match="logit_bias forbids all that may"):
        Sampler(params).sample(LOGITS, ())
    with pytest.raises(UsageError, match=NOTHING_FOLLOWS):
        Sampler(SamplingParams()).sample(LOGITS, (), lambda scores: np.full_like(scores, FORBID))


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ({-1: 1.0}, "a token id of logit_bias must be 0 or more, not -1"),
        ({"5": 1.0}, "a token id of logit_bias must be a whole number, not '5'"),
        ({True: 1.0}, "a token id of logit_bias must be a whole number, not True"),
        ({5: math.inf}, "logit_bias of token 5 must be a number, not inf"),
        ({5: math.nan}, "logit_bias of token 5 must be a number, not nan"),
        ({5: "1"}, "logit_bias of token 5 must be a number, not '1'"),
        ([1, 2], "logit_bias must be numbers by token id"),
        (dict.fromkeys(range(MAX_BIASED_TOKENS + 1), 0.0), "logit_bias has 1025 tokens, at most 1024 can be"),
    ],
)
def test_what_is_no_bias(bias: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SamplingParams(logit_bias=bias)
