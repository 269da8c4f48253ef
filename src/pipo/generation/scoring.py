"""What logits say of the token that came: its negative log-likelihood, and the divergence from another model's.

The figures are llama.cpp's (tools/perplexity), so that they compare: standard errors, percentiles, correlated errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.errors import ComputeError
from pipo.generation.windows import Windows

STEPS_PER_NAT = 2048  # of log-probabilities that are kept in 16 bits: they reach 32 nats below the likeliest token
_MOST_STEPS = 65535
_POSITION_BYTES = 8 + 8 + 8 + 4  # log-likelihood in both models, divergence, the likeliest token
# of a token of the vocabulary: three rows of numbers, a row's pieces, 16 bits; and what the reference's run keeps
_SCRATCH_BYTES = 3 * 8 + 2 * 4 + 2 + 2 * 8 + 2

FloatRow = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Steps = npt.NDArray[np.uint16]


def scoring_bytes(windows: Windows, vocab_size: int) -> int:
    """The memory that scoring takes besides the logits: the text's tokens, figures of each position, scratch."""
    return 4 * len(windows.token_ids) + _POSITION_BYTES * windows.num_scored + _SCRATCH_BYTES * vocab_size


class Scorer(Protocol):
    """Sees the logits of every scored position, in order. Threads: one."""

    def take(self, token_id: int, logits: FloatRow) -> None:
        """`token_id` came after the position; `logits` (vocabulary) are valid until this returns."""


class StepsSink(Protocol):
    def write(self, steps: Steps) -> None: ...


class StepsSource(Protocol):
    def read_into(self, steps: Steps) -> None:
        """The next row."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or what follows from one, with its standard error."""

    value: float
    error: float


class Likelihoods:
    """Keeps the negative log-likelihood of each token that came, in nats."""

    def __init__(self, windows: Windows, vocab_size: int) -> None:
        self._nll = np.empty(windows.num_scored)
        self._below_best = np.empty(vocab_size)
        self._exponentials = np.empty(vocab_size)
        self.num_scored = 0

    @property
    def nll(self) -> Doubles:
        return self._nll[: self.num_scored]

    def take(self, token_id: int, logits: FloatRow) -> None:
        self._note(token_id, logits)
        self.num_scored += 1

    def _note(self, token_id: int, logits: FloatRow) -> float:
        """Logarithm of the sum of what `_below_best` then holds the logarithms of."""
        with np.errstate(all="ignore"):  # what is no number is refused below, in words
            np.subtract(logits, logits.max(), out=self._below_best, dtype=np.float64)
            np.exp(self._below_best, out=self._exponentials)
        log_sum = math.log(total) if (total := float(self._exponentials.sum())) > 0 else math.nan
        nll = log_sum - float(self._below_best[token_id])
        if not math.isfinite(nll):
            raise ComputeError(
                f"scored position {self.num_scored}: the model's logits give the token that came the "
                f"log-likelihood {-nll}, wanted a finite number",
                hint="the file's weights, or those they were made from, are damaged or overflow",
            )
        self._nll[self.num_scored] = nll
        return log_sum


class Recorder(Likelihoods):
    """Keeps also what a Comparer wants of the reference: the likeliest tokens, and all log-probabilities in `sink`."""

    def __init__(self, windows: Windows, vocab_size: int, sink: StepsSink) -> None:
        super().__init__(windows, vocab_size)
        self.best = np.empty(windows.num_scored, np.int32)
        self._sink = sink
        self._steps = np.empty(vocab_size, np.uint16)

    def take(self, token_id: int, logits: FloatRow) -> None:
        self._note(token_id, logits)
        self.best[self.num_scored] = logits.argmax()
        np.multiply(self._below_best, -STEPS_PER_NAT, out=self._below_best)
        np.rint(self._below_best, out=self._below_best)
        np.minimum(self._below_best, _MOST_STEPS, out=self._below_best)
        self._steps[:] = self._below_best
        self._sink.write(self._steps)
        self.num_scored += 1


class Comparer(Likelihoods):
    """Keeps also the KL divergence from the reference, D(reference ‖ model) in nats, of each position.

    The reference's probabilities come in steps of 1/2048 nat and are made to add up to one again, which leaves a
    model's divergence from itself at the variance of that rounding, 1e-8 nats.
    """

    def __init__(self, windows: Windows, vocab_size: int, reference: Recorder, source: StepsSource) -> None:
        super().__init__(windows, vocab_size)
        self.reference = reference
        self._divergence = np.empty(windows.num_scored)
        self.num_same_best = 0
        self._source = source
        self._steps = np.empty(vocab_size, np.uint16)
        self._theirs = np.empty(vocab_size)

    @property
    def divergence(self) -> Doubles:
        return self._divergence[: self.num_scored]

    def take(self, token_id: int, logits: FloatRow) -> None:
        log_sum = self._note(token_id, logits)
        self._source.read_into(self._steps)
        np.multiply(self._steps, -1 / STEPS_PER_NAT, out=self._theirs)
        np.exp(self._theirs, out=self._exponentials)
        their_sum = float(self._exponentials.sum())
        np.subtract(self._theirs, self._below_best, out=self._theirs)
        np.multiply(self._exponentials, self._theirs, out=self._theirs)  # `@` may wake threads of BLAS
        mean = float(self._theirs.sum()) / their_sum
        self._divergence[self.num_scored] = mean + log_sum - math.log(their_sum)
        self.num_same_best += int(logits.argmax() == self.reference.best[self.num_scored])
        self.num_scored += 1


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nll` is the mean negative log-likelihood of a token in nats, `perplexity` its exponential.

    `bits_per_byte`: the same over the bytes of text that the scored tokens stand for.
    """

    num_tokens: int
    nll: Estimate
    perplexity: Estimate
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of a model from a reference on the same tokens. `kl` in nats; percentiles by linear interpolation.

    `ratio` and `difference` are of the perplexities, with errors that know how the two go together.
    """

    kl: Estimate
    kl_median: float
    kl_99: float
    kl_999: float
    kl_max: float
    same_top: Estimate
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate


def mean_of(values: Doubles) -> Estimate:
    """With its standard error; of one value that is not known."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def perplexity_of(nll: Doubles, num_bytes: int) -> Perplexity:
    """Of one position at least; `num_bytes` of text were scored."""
    mean = mean_of(nll)
    bits_per_byte = float(nll.sum()) / math.log(2) / num_bytes if num_bytes else math.nan
    return Perplexity(len(nll), mean, _exponential(mean), bits_per_byte)


def divergence_of(comparer: Comparer) -> Divergence:
    """Of one position at least."""
    ours, kl = comparer.nll, comparer.divergence
    theirs = comparer.reference.nll[: len(ours)]
    log_ratio = mean_of(ours - theirs)
    share = comparer.num_same_best / len(ours)
    error = math.sqrt(share * (1 - share) / (len(ours) - 1)) if len(ours) > 1 else math.nan
    median, kl_99, kl_999 = np.quantile(kl, [0.5, 0.99, 0.999]).tolist()
    return Divergence(
        kl=mean_of(kl),
        kl_median=median,
        kl_99=kl_99,
        kl_999=kl_999,
        kl_max=float(kl.max()),
        same_top=Estimate(share, error),
        log_ratio=log_ratio,
        ratio=_exponential(log_ratio),
        difference=_difference(ours, theirs),
    )


def _exponential(mean: Estimate) -> Estimate:
    try:
        value = math.exp(mean.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, value * mean.error)


def _difference(ours: Doubles, theirs: Doubles) -> Estimate:
    """Of exp(mean) of each: to first order that of `p * ours - q * theirs`, where p and q are the perplexities."""
    p, q = _exponential(mean_of(ours)).value, _exponential(mean_of(theirs)).value
    return Estimate(p - q, mean_of(p * ours - q * theirs).error)
