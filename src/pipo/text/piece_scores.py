"""Scores of sentence pieces that join text in the order of a list of merges.

Sentence pieces join the pair whose whole has the best score, leftmost first; a list of merges the pair that stands
first. Both choose the same whole where the merges to each stand side by side and every pair of tokens that makes a
token is a merge: then the whole's place among the wholes is its score. Lists that transformers makes of a SentencePiece
model hold to that (Llama 2's 58980 merges do); lists that were learned as such do not. What is left is which of two
pairs with the same whole goes first. It can matter only where they overlap, or touch and the whole at once becomes part
of a better one: `doubtful_texts` are made of those, to be looked at. No random vocabulary has shown a difference yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from pipo.text.vocabulary import TokenKind

Merge = tuple[str, str]
_JOINED = frozenset({TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED})


class NoScoresError(Exception):
    """Says which merge is in the way."""


def scores_of(tokens: Sequence[str], kinds: bytearray, merges: Sequence[Merge]) -> list[float]:
    """One for each token, a better one for what is made first. Raises NoScoresError.

    Cost: one look-up for each way to cut each token.
    """
    joined = {text for text, kind in zip(tokens, kinds, strict=True) if kind in _JOINED}
    rank = _ranks(merges)
    for left, right in merges:
        whole = left + right
        if not {left, right, whole} <= joined:
            raise NoScoresError(f"{left!r} and {right!r} make {whole!r}, which are not all ordinary tokens")
    _check_complete(tokens, kinds, joined, set(merges))
    return [-float(rank.get(text, len(rank))) for text in tokens]


def doubtful_texts(merges: Sequence[Merge]) -> Iterator[str]:
    """Where the leftmost of two pairs with one whole need not be the first merge: `oni on ion`, runs of `▁`."""
    by_whole = {whole: list(pairs) for whole, pairs in groupby(merges, "".join)}
    rank = {whole: idx for idx, whole in enumerate(by_whole)}
    for whole, pairs in by_whole.items():
        yield from _overlapping(whole, pairs)
    for left, right in merges:
        for part in (left, right):
            if len(by_whole.get(part, ())) > 1 and rank[left + right] < rank[part]:
                yield from (left + right, part + part, left + part + part + right)


def _overlapping(whole: str, pairs: Sequence[Merge]) -> Iterator[str]:
    before = {left: idx for idx, (left, _) in enumerate(pairs)}  # a whole and its left part give the right one
    for idx, (left, right) in enumerate(pairs):
        other = before.get(right)
        if other is None or other == idx:
            continue
        if pairs[other][1] == left:  # they follow each other for ever
            yield from (right + left + right + left, whole + right, left + whole, whole + whole + left)
        elif other < idx:
            yield whole + pairs[other][1]


def _ranks(merges: Sequence[Merge]) -> dict[str, int]:
    """The place of each whole among the wholes."""
    rank: dict[str, int] = {}
    last = ""
    for left, right in merges:
        whole = left + right
        if whole in rank and whole != last:
            raise NoScoresError(f"{left!r} and {right!r} make {whole!r}, and so does a merge before {last!r}")
        rank.setdefault(whole, len(rank))
        last = whole
    return rank


def _check_complete(tokens: Sequence[str], kinds: bytearray, joined: set[str], merges: set[Merge]) -> None:
    """No two tokens, and no character that is none, would be joined without a merge."""
    for text, kind in zip(tokens, kinds, strict=True):
        if text not in joined or len(text) == 1:
            continue
        if kind == TokenKind.NORMAL and not joined.issuperset(text):
            raise NoScoresError(f"{text!r} has a character that is no token")
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in merges and pair[0] in joined and pair[1] in joined:
                raise NoScoresError(f"{pair[0]!r} and {pair[1]!r} make a token, but not by a merge")
