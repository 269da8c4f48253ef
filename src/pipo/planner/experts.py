"""What a pass does with the experts of a mixture, in expectation: how many it needs, how many of them are missing.

Nobody knows before a run which experts it will want. Popularity is taken to fall with rank by a power (Zipf), and the
experts that fit to be those that are wanted most; a recorded run says it better (`pipo plan --experts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from pipo.base.machine import StageWork
from pipo.base.tensor_type import TensorType

ASSUMED_SKEW = 0.8  # of rank r: r ** -skew. Uniform routing would be 0
ASSUMED_RECALL = 0.9  # of missing experts, asked for one block ahead because the router foretold them


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """The routed experts of a stage: what computing one of them is, and what reading it is."""

    work: StageWork
    num_bytes: int
    repacked_as: TensorType | None
    num_experts: int
    num_experts_per_tok: int


@dataclass(frozen=True, slots=True)
class ExpectedRouting:
    """What is known of it. `misses`: from a recorded run, by the share of all experts that fit, ascending, the share of
    needed ones that is missing; None takes the assumption. `recall` of what is missing is asked for in time.
    """

    source: str = f"assumed: popularity of rank r falls as r^-{ASSUMED_SKEW:g}, {ASSUMED_RECALL:.0%} foretold"
    skew: float = ASSUMED_SKEW
    recall: float = ASSUMED_RECALL
    misses: Sequence[tuple[float, float]] | None = None

    def num_needed(self, experts: ExpertWork, num_tokens: int) -> float:
        """Of a block, by a pass of so many tokens."""
        return sum(1 - (1 - share) ** num_tokens for share in self._shares(experts))

    def num_missing(self, experts: ExpertWork, num_tokens: int, held_share: float) -> float:
        """Of those, with this share of all experts in RAM."""
        if held_share >= 1:
            return 0.0
        if self.misses is not None and num_tokens == 1:
            return experts.num_experts_per_tok * _between(self.misses, held_share)
        shares = self._shares(experts)
        num_held = int(held_share * len(shares))
        return sum(1 - (1 - share) ** num_tokens for share in shares[num_held:])

    def _shares(self, experts: ExpertWork) -> Sequence[float]:
        return _shares(experts.num_experts, experts.num_experts_per_tok, self.skew)


ASSUMED = ExpectedRouting()


@lru_cache
def _shares(num_experts: int, num_per_tok: int, skew: float) -> Sequence[float]:
    """Of tokens that pass the expert of each rank; none can pass more than all. They add up to `num_per_tok`."""
    weights = [rank**-skew for rank in range(1, num_experts + 1)]
    for num_full in range(num_per_tok + 1):
        rest = weights[num_full:]
        scale = (num_per_tok - num_full) / sum(rest) if rest else 0.0
        if not rest or rest[0] * scale <= 1:
            return [1.0] * num_full + [weight * scale for weight in rest]
    return [1.0] * num_experts


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """On straight lines between the points, as at the nearest end beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
