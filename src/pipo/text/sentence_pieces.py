"""SentencePiece's BPE (`tokenizer.ggml.model` = llama): no merge list, the token with the higher score is made first.

Written out instead of being turned into ranked merges for the `tokenizers` library: tokens share scores (391 of
Baichuan's have 0.0), among which the leftmost pair goes first, and a list of ranks cannot say that.
"""

from __future__ import annotations

import heapq
import re
from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise

from pipo.base.errors import MalformedFile
from pipo.text.vocabulary import TOKENS_KEY, TokenKind, read_byte_tokens

SPACE_MARK = "▁"
_CACHED_WORDS = 8192
_LONGEST_CACHED_WORD = 64
_CROSSES_WORDS = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}")
_WORDS = re.compile(f"{SPACE_MARK}+[^{SPACE_MARK}]*|[^{SPACE_MARK}]+")
# Control, unknown and byte tokens are never made from letters: a user's "<s>" stays text
_KINDS_OF_TEXT = frozenset({TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.UNDEFINED})


class SentencePieces:
    """Joins neighbouring pieces, best score first, leftmost first among equals. Threads: any.

    A character that is no token becomes its bytes' tokens where the model has all 256, else the unknown token.
    Cost: about 1 µs a word that was seen before, 3 µs a character otherwise.
    """

    def __init__(
        self, token_ids: Mapping[str, int], kinds: bytearray, scores: array[float], unknown_id: int | None
    ) -> None:
        self._texts = list(token_ids)
        self._scores = scores
        self._token_ids = {text: idx for text, idx in token_ids.items() if kinds[idx] in _KINDS_OF_TEXT}
        self._byte_ids = read_byte_tokens(token_ids, kinds)
        self._has_all_bytes = len(self._byte_ids) == 256
        if not self._has_all_bytes and unknown_id is None:
            raise MalformedFile(f"key {TOKENS_KEY!r} has neither 256 byte tokens nor an unknown token")
        self._unknown_id = unknown_id
        self._splits_words = not any(_CROSSES_WORDS.search(text) for text in self._token_ids)
        self._encode_cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._words(text.replace(" ", SPACE_MARK)):
            ids += self._encode_cached(word) if len(word) <= _LONGEST_CACHED_WORD else self._encode_word(word)
        return ids

    def token_text(self, token_id: int) -> str:
        return self._texts[token_id]

    def plain_bytes(self, text: str) -> bytes:
        """What a normal token stands for."""
        return text.replace(SPACE_MARK, " ").encode()

    def _words(self, text: str) -> list[str]:
        """Parts that no token spans."""
        return _WORDS.findall(text) if self._splits_words else [text]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(token_id for piece in self._join(list(word)) for token_id in self._piece_ids(piece))

    def _piece_ids(self, piece: str) -> Iterator[int]:
        token_id = self._token_ids.get(piece)
        if token_id is not None:
            yield token_id
        elif self._has_all_bytes:
            yield from (self._byte_ids[byte] for byte in piece.encode())
        elif self._unknown_id is not None:
            yield self._unknown_id

    def _join(self, pieces: list[str]) -> list[str]:
        """`pieces` joined as far as it goes; a piece that went into its left neighbour is left empty meanwhile."""
        after = [*range(1, len(pieces)), -1]
        before = list(range(-1, len(pieces) - 1))
        candidates: list[tuple[float, int, int, str]] = []

        def propose(left: int, right: int) -> None:
            text = pieces[left] + pieces[right]
            token_id = self._token_ids.get(text)
            if token_id is not None:
                heapq.heappush(candidates, (-self._scores[token_id], left, right, text))

        for left, right in pairwise(range(len(pieces))):
            propose(left, right)
        while candidates:
            _, left, right, text = heapq.heappop(candidates)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != len(text):
                continue  # one of them was joined to something else since
            pieces[left], pieces[right] = text, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
                propose(left, after[right])
            if before[left] >= 0:
                propose(before[left], left)
        return [piece for piece in pieces if piece]
