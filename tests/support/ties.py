"""Greedy answers that may part where two tokens are as good as equally likely."""

from __future__ import annotations

from collections.abc import Sequence

from pipo.generation.answer import Piece
from pipo.generation.request import Sampled

# of log-probabilities: a row's sums run in another order where the pass has another shape, and F16 keys and values
# differ by 3e-3 between the ways that ggml's attention takes
TIE = 0.02


def tokens_of(pieces: Sequence[Piece]) -> list[Sampled]:
    return [piece.token for piece in pieces if piece.token is not None]


def part_at_a_tie(found: Sequence[Sampled], want: Sequence[Sampled]) -> bool:
    """Whether two answers differ, which they may only from a tie on. `want` has its two likeliest tokens."""
    for ours, theirs in zip(found, want, strict=True):
        if ours.token_id != theirs.token_id:
            logprobs = dict(theirs.top)
            assert ours.token_id in logprobs, "not even the second best"
            assert logprobs[theirs.token_id] - logprobs[ours.token_id] < TIE
            return True
    return False
