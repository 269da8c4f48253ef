"""Choose the next token from the logits.

Order of the steps, as in llama.cpp: bias, penalties, constraint, top-k, top-p, min-p, temperature, draw. Each filter is
a function from values to the positions that stay, in ascending order, so equal logits always resolve to the lowest id.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pipo.base.errors import ComputeError, UsageError
from pipo.generation.request import Sampled, SamplingParams, TopLogprobs

__all__ = ["Sampled", "Sampler", "biased", "keep_min_p", "keep_top_k", "keep_top_p", "penalised"]

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp]
Constrain = Callable[[Floats], Floats]  # a copy of logits, -inf where a token is forbidden
NOTHING_FOLLOWS = "no token can follow: the model has none for what the constraint wants"
_LARGEST = float(np.finfo(np.float32).max)


class Sampler:
    """Draws tokens for one sequence. Two samplers with the same parameters and seed choose the same tokens.

    Cost for 128k logits (one core, AVX-512): greedy 10 µs, defaults 0.2 ms, logprobs 0.1 ms more.
    Threads: not to be shared.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = params.seed if params.seed is not None else secrets.randbits(32)
        self._rng = np.random.Generator(np.random.PCG64(self.seed))
        self._filters = _filters(params)

    def sample(self, logits: Floats, history: Sequence[int], constrain: Constrain | None = None) -> Sampled:
        """Choose a token. `history` is prompt and answer so far; only the penalties read it. Does not alter `logits`.

        Shapes: logits (vocab).
        Raises: ComputeError if any logit is NaN or +inf, or all are -inf; UsageError where bias and constraint leave
        nothing to choose.
        """
        best = _finite_argmax(logits)
        scores = biased(logits, self.params.logit_bias) if self.params.logit_bias else logits
        scores = penalised(scores, history, self.params) if self.params.has_penalties else scores
        scores = scores if constrain is None else constrain(scores)
        if scores is logits:
            token_id = best if self.params.is_greedy else self._draw(scores)
        else:
            token_id = self._choose_allowed(scores)
        if self.params.logprobs is None:
            return Sampled(token_id)
        return _with_logprobs(logits, float(logits[best]), token_id, self.params.logprobs)

    def _choose_allowed(self, scores: Floats) -> int:
        """Before all filters: what is forbidden would be among the k largest where few others are allowed."""
        allowed = np.flatnonzero(scores > -np.inf)
        if not len(allowed):
            if self.params.logit_bias:
                raise UsageError("no token can follow: logit_bias forbids all that may", hint="forbid fewer tokens")
            raise UsageError(NOTHING_FOLLOWS, hint="a constraint of what the model can write")
        kept = scores[allowed]
        return int(allowed[int(kept.argmax()) if self.params.is_greedy else self._draw(kept)])

    def _draw(self, scores: Floats) -> int:
        ids: Positions | None = None
        for keep in self._filters:
            kept = keep(scores)
            scores = scores[kept]
            ids = kept if ids is None else ids[kept]
        position = self._draw_position(scores)
        return position if ids is None else int(ids[position])

    def _draw_position(self, scores: Floats) -> int:
        """Invert the cumulative distribution at one uniform number."""
        wide = scores.astype(np.float64)
        cumulative = np.exp((wide - wide.max()) / self.params.temperature).cumsum()
        position = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return min(position, len(scores) - 1)


def biased(logits: Floats, bias: Mapping[int, float]) -> Floats:
    """A copy with what is to be added to some tokens; -inf forbids, and no finite bias does."""
    scores = logits.copy()
    ids, values = np.fromiter(bias.keys(), np.intp), np.fromiter(bias.values(), np.float64)
    sums = scores[ids] + values
    scores[ids] = np.where(np.isfinite(sums), np.clip(sums, -_LARGEST, _LARGEST), sums)
    return scores


def penalised(logits: Floats, history: Sequence[int], params: SamplingParams) -> Floats:
    """A copy in which tokens of the recent history score less: once per token for repeat and presence,
    once per occurrence for frequency."""
    recent = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
    ids, counts = np.unique(np.asarray(recent, dtype=np.intp), return_counts=True)
    values = logits[ids].astype(np.float64)
    values = np.where(values > 0, values / params.repeat_penalty, values * params.repeat_penalty)
    scores = logits.copy()
    scores[ids] = values - counts * params.frequency_penalty - params.presence_penalty
    return scores


def keep_top_k(values: Floats, k: int) -> Positions:
    """The `k` largest."""
    if k >= len(values):
        return np.arange(len(values))
    smallest = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > smallest)
    ties = np.flatnonzero(values == smallest)[: k - len(above)]
    return np.sort(np.concatenate((above, ties)))


def keep_top_p(values: Floats, p: float) -> Positions:
    """The fewest largest whose probabilities reach `p`; never none."""
    falling = np.sort(values)[::-1].astype(np.float64)
    reached = np.exp(falling - falling[0]).cumsum()
    return keep_top_k(values, int(np.searchsorted(reached, p * reached[-1])) + 1)


def keep_min_p(values: Floats, p: float) -> Positions:
    """Those at least `p` times as likely as the likeliest."""
    return np.flatnonzero(values >= float(values.max()) + math.log(p))


def _filters(params: SamplingParams) -> tuple[Callable[[Floats], Positions], ...]:
    filters: list[Callable[[Floats], Positions]] = []
    if params.top_k > 0:
        filters.append(partial(keep_top_k, k=params.top_k))
    if params.top_p < 1:
        filters.append(partial(keep_top_p, p=params.top_p))
    if params.min_p > 0:
        filters.append(partial(keep_min_p, p=params.min_p))
    return tuple(filters)


def _finite_argmax(logits: Floats) -> int:
    """The first largest. NaN counts as largest in numpy, so one look at the result finds any."""
    best = int(logits.argmax())
    if not math.isfinite(logits[best]):
        what = "NaN" if math.isnan(logits[best]) else f"{logits[best]} as its largest logit"
        raise ComputeError(
            f"the model produced {what} (token {best} of {len(logits)})",
            hint="the weights may be damaged: compare the model file with its published checksum",
        )
    return best


def scored(logits: Floats, token_id: int, num_top: int) -> Sampled:
    """A token that came, whatever was likely. Raises ComputeError as `Sampler.sample`."""
    return _with_logprobs(logits, float(logits[_finite_argmax(logits)]), token_id, num_top)


def _with_logprobs(logits: Floats, peak: float, token_id: int, num_top: int) -> Sampled:
    log_total = peak + math.log(float(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    return Sampled(token_id, float(logits[token_id]) - log_total, _top_logprobs(logits, log_total, num_top))


def _top_logprobs(logits: Floats, log_total: float, num_top: int) -> TopLogprobs:
    if num_top == 0:
        return ()
    ids = keep_top_k(logits, num_top)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return tuple((int(token_id), float(logits[token_id]) - log_total) for token_id in ids)
