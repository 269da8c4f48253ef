"""Tokens to text while they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a Tokenizer."""

    @property
    def prefixes_space(self) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_hidden(self, token_id: int) -> bool: ...


class IncrementalDetokenizer:
    """Gives text as soon as its characters are whole: tokens may end in the middle of one.

    Joined, the pieces are what all bytes decode to; bytes that are not UTF-8 become U+FFFD. Hidden tokens give "".
    The space that `encode` puts before text is taken away where text begins: at the start, or when the last of
    `after`, the tokens before, is a hidden one; `keeps_space` is for text that a constraint describes to the byte.
    Hidden tokens in `shown` give their names. Does not stop at end tokens. Threads: one.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        after: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
        *,
        keeps_space: bool = False,
    ) -> None:
        self._tokens = tokens
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begins = not after or tokens.is_hidden(after[-1])
        self._drops_space = begins and tokens.prefixes_space and not keeps_space

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._tokens.is_hidden(token_id) and token_id not in self._shown:
            return ""
        data = self._tokens.token_bytes(token_id)
        if self._drops_space and data:
            self._drops_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD where a character was left half."""
        return self._decoder.decode(b"", final=True)
