"""Likelihoods and divergences from logits: against the formulas written out in numpy, and llama.cpp's sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipo.base.errors import ComputeError
from pipo.generation.scoring import (
    Comparer,
    Likelihoods,
    Recorder,
    divergence_of,
    mean_of,
    perplexity_of,
    scoring_bytes,
)
from pipo.generation.windows import Windows

VOCAB, NUM = 97, 60
WINDOWS = Windows(range(1000), 2 * NUM + 2, 1)
Doubles = npt.NDArray[np.float64]


class Rows:
    """What a file does, in a list."""

    def __init__(self) -> None:
        self.rows: list[npt.NDArray[np.uint16]] = []

    def write(self, steps: npt.NDArray[np.uint16]) -> None:
        self.rows.append(steps.copy())

    def read_into(self, steps: npt.NDArray[np.uint16]) -> None:
        steps[:] = self.rows.pop(0)


def logits_of(seed: int, scale: float = 4.0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, (NUM, VOCAB)).astype(np.float32)


def log_softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def compared(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32], tokens: list[int]) -> Comparer:
    rows = Rows()
    recorder = Recorder(WINDOWS, VOCAB, rows)
    for token, row in zip(tokens, theirs, strict=True):
        recorder.take(token, row)
    comparer = Comparer(WINDOWS, VOCAB, recorder, rows)
    for token, row in zip(tokens, ours, strict=True):
        comparer.take(token, row)
    return comparer


@pytest.fixture
def tokens() -> list[int]:
    return [int(i) for i in np.random.default_rng(5).integers(0, VOCAB, NUM)]


def test_windows_are_as_long_as_the_rows() -> None:
    assert WINDOWS.num_scored == NUM


def test_likelihoods(tokens: list[int]) -> None:
    logits, scorer = logits_of(1), Likelihoods(WINDOWS, VOCAB)
    for token, row in zip(tokens, logits, strict=True):
        scorer.take(token, row)
    want = -log_softmax(logits)[range(NUM), tokens]
    np.testing.assert_allclose(scorer.nll, want, rtol=1e-12)
    found = perplexity_of(scorer.nll, num_bytes=123)
    assert found.num_tokens == NUM
    assert found.perplexity.value == pytest.approx(np.exp(want.mean()), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(want.sum() / math.log(2) / 123, rel=1e-12)


def test_a_standard_error_is_that_of_sums_of_squares(tokens: list[int]) -> None:
    """llama.cpp: sqrt((sum of squares / n - mean²) / (n - 1)), and that times the perplexity."""
    x = np.random.default_rng(2).gamma(2.0, size=NUM)
    error = math.sqrt(((x * x).sum() / NUM - x.mean() ** 2) / (NUM - 1))
    assert mean_of(x).error == pytest.approx(error, rel=1e-9)
    found = perplexity_of(x, 1).perplexity
    assert found.error == pytest.approx(found.value * error, rel=1e-9)
    assert math.isnan(mean_of(x[:1]).error)


def test_divergence_from_a_reference(tokens: list[int]) -> None:
    ours, theirs = logits_of(1), logits_of(1) + logits_of(3, scale=0.3)
    comparer = compared(ours, theirs, tokens)
    p, q = log_softmax(theirs), log_softmax(ours)
    want = (np.exp(p) * (p - q)).sum(axis=1)
    # rounding to 1/2048 nat: an independent error of each log-probability, of at most half a step
    np.testing.assert_allclose(comparer.divergence, want, atol=0.5 / 2048 * 0.3 * 2)
    found = divergence_of(comparer)
    assert found.kl.value == pytest.approx(want.mean(), rel=1e-3)
    assert found.kl_median == pytest.approx(np.median(want), abs=2e-4)
    assert found.kl_99 == pytest.approx(np.percentile(want, 99), abs=2e-4)
    assert found.kl_999 == pytest.approx(np.percentile(want, 99.9), abs=2e-4)
    assert found.kl_max == pytest.approx(want.max(), abs=2e-4)
    share = (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()
    assert 0 < share < 1 and found.same_top.value == share
    assert found.same_top.error == pytest.approx(math.sqrt(share * (1 - share) / (NUM - 1)))


def test_errors_of_ratio_and_difference_know_the_correlation(tokens: list[int]) -> None:
    """llama.cpp: from the variances of both and their covariance."""
    ours, theirs = logits_of(1), logits_of(1) + logits_of(3, scale=0.3)
    found = divergence_of(compared(ours, theirs, tokens))
    a, b = (-log_softmax(each)[range(NUM), tokens] for each in (ours, theirs))
    va, vb = (mean_of(each).error ** 2 for each in (a, b))
    cov = ((a * b).mean() - a.mean() * b.mean()) / (NUM - 1)
    error = math.sqrt(va + vb - 2 * cov)
    assert found.log_ratio.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found.log_ratio.error == pytest.approx(error, rel=1e-6)
    assert found.ratio.value == pytest.approx(math.exp(a.mean() - b.mean()))
    assert found.ratio.error == pytest.approx(found.ratio.value * error, rel=1e-6)
    pa, pb = np.exp(a.mean()), np.exp(b.mean())
    error = math.sqrt(pa**2 * va + pb**2 * vb - 2 * pa * pb * cov)
    assert found.difference.value == pytest.approx(pa - pb)
    assert found.difference.error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("scale", [0.01, 4.0, 30.0])
def test_a_model_does_not_diverge_from_itself(tokens: list[int], scale: float) -> None:
    """But by the variance of rounding: a step is 1/2048 nat, its variance a twelfth of its square, KL half of that."""
    logits = logits_of(1, scale)
    comparer = compared(logits, logits, tokens)
    assert comparer.divergence.min() > -1e-12
    assert comparer.divergence.max() < 4 * 0.5 / 2048**2 / 12
    assert divergence_of(comparer).same_top.value == 1.0
    assert divergence_of(comparer).ratio.value == 1.0


def test_what_is_unlikely_beyond_the_steps_keeps_its_place(tokens: list[int]) -> None:
    logits = logits_of(1)
    logits[:, 3] -= 200.0  # e^-200 of the likeliest: in the reference it counts as e^-32
    tokens = [token if token != 3 else 4 for token in tokens]
    assert compared(logits, logits, tokens).divergence.max() < 1e-7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = logits_of(1)[0]
    logits[5] = bad
    scorer = Likelihoods(WINDOWS, VOCAB)
    with np.errstate(all="raise"), pytest.raises(ComputeError, match="wanted a finite number"):
        scorer.take(5, logits)
    assert scorer.num_scored == 0


def test_what_scoring_keeps_is_counted() -> None:
    def bytes_of(thing: Any) -> int:
        return sum(value.nbytes for value in vars(thing).values() if isinstance(value, np.ndarray))

    rows = Rows()
    recorder = Recorder(WINDOWS, VOCAB, rows)
    first = bytes_of(recorder)
    both = recorder.best.nbytes + recorder._nll.nbytes + bytes_of(Comparer(WINDOWS, VOCAB, recorder, rows))
    assert max(first, both) <= scoring_bytes(WINDOWS, VOCAB) - 4 * len(WINDOWS.token_ids)
