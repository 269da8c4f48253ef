"""The order in which the rows of a window are asked: what begins alike side by side, then what is as long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pipo.jobs.preparation import Prepared

SHARED_TOKENS = 16  # beyond what the whole window shares, for rows to be of one family


def grouped(window: Sequence[Prepared]) -> list[Prepared]:
    """Families that share a prefix one after another, the shortest prompts first, within a family as well.

    Sequences of a pass that are as long end together, and a prefix whose keys and values are there still is not
    computed again. Cost: a sort. Rows that are equal keep the table's order.
    """
    ordered = sorted(window, key=lambda each: tuple(each.request.prompt))
    if not ordered:
        return []
    # all of a sorted list begin as its first and its last do
    common = shared(ordered[0].request.prompt, ordered[-1].request.prompt)
    families: list[list[Prepared]] = [[ordered[0]]]
    for before, each in pairwise(ordered):
        if shared(before.request.prompt, each.request.prompt) >= common + SHARED_TOKENS:
            families[-1].append(each)
        else:
            families.append([each])
    by_length = [sorted(family, key=_num_tokens) for family in families]
    return [each for family in sorted(by_length, key=lambda family: _num_tokens(family[0])) for each in family]


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _num_tokens(prepared: Prepared) -> int:
    return len(prepared.request.prompt)
