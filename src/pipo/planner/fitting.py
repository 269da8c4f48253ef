"""Which of several attempts fits, and which blocks of many: what placements in RAM and on a device share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Fit = TypeVar("Fit")


def first_fitting(attempt: Callable[[int], Fit | None], num: int) -> Fit | None:
    """What the first of the `num` attempts that fits gives; None where none does. A later one takes less room, but for
    what blocks of unequal size do: halving finds a neighbour of the first, or the first itself.
    """
    fitting = attempt(0)
    if fitting is not None or num == 1:
        return fitting
    fitting = attempt(num - 1)
    if fitting is None:
        return next((found for i in range(1, num - 1) if (found := attempt(i)) is not None), None)
    low, high = 0, num - 1  # the one does not fit, the other does
    while high - low > 1:
        middle = (low + high) // 2
        found = attempt(middle)
        low, high, fitting = (middle, high, fitting) if found is None else (low, middle, found)
    return fitting


def spread(blocks: Sequence[int], num: int) -> set[int]:
    """`num` of the blocks, evenly apart."""
    total = len(blocks)
    return {b for i, b in enumerate(blocks) if (i + 1) * num // total > i * num // total}
