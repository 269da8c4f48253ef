"""How several prompts share the tokens of a pass that are left for prefill."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_SHARE = 8  # a pass with many small parts pays for each of them


def shares(remaining: Sequence[int], room: int) -> list[int]:
    """Tokens that each of the prompts, in order of arrival, has computed in a pass with room for `room`.

    Each takes half of what those before it left, the last one all of it, and what nobody took goes to the first: the
    one that came first is ready first, and however long it is, the others go on beside it.
    """
    given, left = [], room
    for i, wanted in enumerate(remaining):
        is_last = i == len(remaining) - 1
        most = left if is_last else min(max(left // 2, LEAST_SHARE), left, max(room // 2, 1))
        given.append(min(wanted, most))
        left -= given[-1]
    for i, wanted in enumerate(remaining):
        more = min(wanted - given[i], left)
        given[i] += more
        left -= more
    return given
