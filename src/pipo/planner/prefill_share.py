"""How much of prompts may share a pass with sequences that decode, so that these hardly wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipo.planner.cost import PassLoad
from pipo.planner.simulate import Forecast, Lane

SLOWER = 1.25  # than a pass of decode alone: what a pass with a part of a prompt may be


def prefill_beside_decode(
    forecast: Callable[[PassLoad], Forecast], decode: PassLoad, chunks: Sequence[int]
) -> int | None:
    """Tokens: where decode waits for the drive, or the link to a device, the most of `chunks`, which ascend, that make
    the pass at most SLOWER times as slow, the fewest at least. None, which is no limit, where it waits for compute: a
    token of a prompt then costs the same whenever it is computed.
    """
    alone = forecast(decode)
    busiest = max(Lane, key=lambda lane: alone.busy[lane])
    if busiest not in (Lane.DRIVE, Lane.UPLOAD):
        return None
    fitting = [chunk for chunk in chunks if forecast(_with(decode, chunk)).seconds <= SLOWER * alone.seconds]
    return max(fitting, default=chunks[0])


def _with(decode: PassLoad, chunk: int) -> PassLoad:
    """As if the tokens of the prompt were spread over all sequences: the products do not tell."""
    more = -(-chunk // decode.num_sequences)
    return PassLoad(decode.num_sequences, 1 + more, decode.num_positions + more / 2)
