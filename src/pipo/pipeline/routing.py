"""Which experts each token passes, from the router's scores: chosen on the host, where a NaN is an error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipo.base.errors import ComputeError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of each token, in ascending order, and the weights of their results. Shapes: (tokens, experts)."""

    experts: IntArray
    weights: FloatArray

    @property
    def num_tokens(self) -> int:
        return len(self.experts)


def route(scores: FloatArray, num_experts_per_tok: int, *, renormalise: bool, what: str) -> Routing:
    """Softmax over all experts, of which the likeliest stay; of equal ones the first. `scores`: (tokens, experts).

    Raises ComputeError, which names `what`, for scores that are not finite.
    """
    chosen = likeliest(scores, num_experts_per_tok, what)
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = np.take_along_axis(exponents, chosen, axis=1)
    weights /= (weights if renormalise else exponents).sum(axis=1, keepdims=True)
    return Routing(chosen, weights)


def likeliest(scores: FloatArray, num: int, what: str) -> IntArray:
    """(tokens, num), ascending. Raises ComputeError."""
    if not np.isfinite(scores).all():
        token = int(np.argmin(np.isfinite(scores).all(axis=1)))
        raise ComputeError(
            f"{what} gave scores that are not finite for token {token} of the pass",
            hint="the weights are damaged, or overflow their type: try another file of this model",
        )
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :num], axis=1)
