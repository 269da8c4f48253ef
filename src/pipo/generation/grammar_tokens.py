"""A model's tokens as llguidance wants them: which bytes each stands for, which are no text, which end an answer.

llguidance is imported when the first one is built: only who asks for constraints pays for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, overload

from pipo.base.errors import UsageError
from pipo.base.units import MIB
from pipo.hardware.memory import release_free_memory

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Anonymous memory while it is built; half of that stays. Measured with byte pairs of 49k and 150k tokens and with
# random ones, which share no beginnings: 20 to 37 bytes for each byte of text and 60 for each token.
_BYTES_PER_TOKEN = 72
_BYTES_PER_TEXT_BYTE = 40
_IMPORT_BYTES = 2 * MIB
_MAX_TOKEN_BYTES = 1000  # llguidance has 10 bits for the depth of its tree and panics beyond


class GrammarTokenizer(Protocol):
    """What is needed of a model's tokenizer."""

    @property
    def end_ids(self) -> frozenset[int]: ...

    def encode_part(self, text: str, *, is_first: bool = False) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def is_hidden(self, token_id: int) -> bool: ...


class TokenTexts(Sequence[bytes]):
    """The bytes of each row of the model, made when they are asked for.

    Empty, and so never chosen under a constraint, where no token has the row or it is too long for llguidance.
    """

    def __init__(self, tokenizer: GrammarTokenizer, num_rows: int) -> None:
        self._tokenizer = tokenizer
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(self._num_rows)[index]]
        if not 0 <= index < self._num_rows:
            raise IndexError(index)
        try:
            text = self._tokenizer.token_bytes(index)
        except UsageError:  # the model is padded
            return b""
        return text if len(text) <= _MAX_TOKEN_BYTES else b""

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(self._num_rows))


class GrammarTokens:
    """Built once a model, used by all of its constraints. Threads: any.

    Cost: 40 ms for 49k tokens, 0.15 s for 150k. Without llguidance's "slices", which cost three times the memory and
    save 0.1 ms a token of free text.
    Raises UsageError where the model has no end token.
    """

    def __init__(self, tokenizer: GrammarTokenizer, num_rows: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.num_rows = num_rows
        self.end_ids = sorted(token_id for token_id in tokenizer.end_ids if token_id < num_rows)
        if not self.end_ids:
            raise UsageError("the model names no end token, without which no answer can follow a constraint")
        texts = TokenTexts(tokenizer, num_rows)
        encoder = _Encoder(tokenizer, texts, self.end_ids[0])
        wrapper = TokenizerWrapper(encoder)
        self.library: LLTokenizer = LLTokenizer(wrapper, n_vocab=num_rows, eos_token=self.end_ids, slices=[])
        encoder.library = self.library
        self.token_bytes = tokenizer.token_bytes
        release_free_memory()


def grammar_tokens_bytes(tokenizer: GrammarTokenizer, num_rows: int) -> int:
    """The most that building GrammarTokens takes. Cost: 30 ms for 49k tokens."""
    num_bytes = sum(map(len, TokenTexts(tokenizer, num_rows)))
    return _IMPORT_BYTES + num_rows * _BYTES_PER_TOKEN + num_bytes * _BYTES_PER_TEXT_BYTE


class _Prefix(NamedTuple):
    ids: list[int]
    num_bytes: int


class _Encoder:
    """A tokenizer under the names that llguidance looks for, which asks how the model would write what is forced."""

    def __init__(self, tokenizer: GrammarTokenizer, texts: TokenTexts, end_id: int) -> None:
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.tokens = texts
        self.special_token_ids = [i for i in range(len(texts)) if tokenizer.is_hidden(i)]
        self._special = frozenset(self.special_token_ids)
        self.library: LLTokenizer | None = None
        self._encode = tokenizer.encode_part

    def __call__(self, text: bytes) -> list[int]:
        """Tokens that stand for exactly these bytes, or for as many of the first as there are tokens for: llguidance
        allows them without a look at what they stand for. A model's own encoding may put a space before, compose
        letters or leave out what it has no token for.
        """
        whole = text.decode(errors="replace")
        found = self._exact(self._encode(whole), text)
        if found.num_bytes == len(text) or self.library is None:
            return found.ids
        return max(found, self._exact(self.library.greedy_tokenize(whole), text), key=lambda each: each.num_bytes).ids

    def _exact(self, ids: list[int], text: bytes) -> _Prefix:
        """As many of the first tokens as stand for the first bytes."""
        num_bytes = 0
        for i, token_id in enumerate(ids):
            part = self.tokens[token_id] if token_id < len(self.tokens) else b""
            if not part or not text.startswith(part, num_bytes) or token_id in self._special:
                return _Prefix(ids[:i], num_bytes)
            num_bytes += len(part)
        return _Prefix(ids, num_bytes)
