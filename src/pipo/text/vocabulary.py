"""The tokens of a model as GGUF lists them, checked: texts, kinds and scores."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Mapping
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.errors import MalformedFile

log = logging.getLogger(__name__)

TOKENS_KEY = "tokenizer.ggml.tokens"
KINDS_KEY = "tokenizer.ggml.token_type"
SCORES_KEY = "tokenizer.ggml.scores"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Keys(Protocol):
    """Values by key; None exactly where a key is absent."""

    def get(self, key: str) -> object | None: ...


class TokenizerMetadata(Protocol):
    """A model file's keys and values.

    `get`, `text` and `flag` are None exactly where the key is absent; for an array `get` may be any object. The others
    raise MalformedFile where the key is of another type.
    """

    def get(self, key: str) -> object | None: ...

    def text(self, key: str) -> str | None: ...

    def flag(self, key: str) -> bool | None: ...

    def strings(self, key: str) -> list[str]: ...

    def array(self, key: str) -> npt.NDArray[np.generic]: ...


class TokenKind(IntEnum):
    """What a token is for, numbered as in the key `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # structure, like the end of a turn: never text, read from text only on demand
    USER_DEFINED = 4  # text that is one token wherever it stands
    UNUSED = 5
    BYTE = 6  # one byte, spelled <0x0A>


def read_token_id(metadata: Keys, key: str, vocab_size: int) -> int | None:
    """None, with a warning, where the vocabulary has no such token: so llama.cpp does. Raises MalformedFile."""
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedFile(f"key {key!r} is {value!r:.80}, wanted a token id")
    if not 0 <= value < vocab_size:
        log.warning("key=%s token=%d action=ignored reason='the vocabulary has %d tokens'", key, value, vocab_size)
        return None
    return value


def read_token_ids(metadata: TokenizerMetadata) -> dict[str, int]:
    """The id of each token's text, in the order of ids. Empty texts are named [EMPTY_id], as in llama.cpp."""
    _require(metadata, TOKENS_KEY)
    texts = metadata.strings(TOKENS_KEY)
    token_ids = {text or f"[EMPTY_{idx}]": idx for idx, text in enumerate(texts)}
    if not texts:
        raise MalformedFile(f"key {TOKENS_KEY!r} has no tokens")
    if len(token_ids) != len(texts):
        names = [text or f"[EMPTY_{idx}]" for idx, text in enumerate(texts)]
        first, last = next((idx, token_ids[name]) for idx, name in enumerate(names) if token_ids[name] != idx)
        raise MalformedFile(f"key {TOKENS_KEY!r} has {names[last]!r:.80} twice, as token {first} and {last}")
    return token_ids


def read_kinds(metadata: TokenizerMetadata, vocab_size: int) -> bytearray:
    """One TokenKind a token; all NORMAL where the file does not say."""
    if metadata.get(KINDS_KEY) is None:
        return bytearray([TokenKind.NORMAL]) * vocab_size
    kinds = metadata.array(KINDS_KEY)
    _check_length(KINDS_KEY, kinds, vocab_size)
    if not np.issubdtype(kinds.dtype, np.integer):
        raise MalformedFile(f"key {KINDS_KEY!r} has elements of type {kinds.dtype}, wanted integers")
    is_kind = np.isin(kinds, list(TokenKind))
    if not is_kind.all():
        idx = int(np.argmin(is_kind))
        raise MalformedFile(f"key {KINDS_KEY!r} has type {kinds[idx]} for token {idx}, the types are 0 to 6")
    return bytearray(kinds.astype(np.uint8).tobytes())


def read_scores(metadata: TokenizerMetadata, vocab_size: int) -> array[float]:
    """One score a token; a pair of pieces with a higher one is joined first."""
    _require(metadata, SCORES_KEY)
    scores = metadata.array(SCORES_KEY)
    _check_length(SCORES_KEY, scores, vocab_size)
    if not np.issubdtype(scores.dtype, np.number):
        raise MalformedFile(f"key {SCORES_KEY!r} has elements of type {scores.dtype}, wanted numbers")
    floats = scores.astype(np.float32)
    if np.isnan(floats).any():
        raise MalformedFile(f"key {SCORES_KEY!r} has no number for token {int(np.isnan(floats).argmax())}")
    return array("f", floats.tobytes())


def read_byte_tokens(token_ids: Mapping[str, int], kinds: bytearray) -> dict[int, int]:
    """The token of each byte that has one. Raises MalformedFile where a byte token does not say which byte it is."""
    found: dict[int, int] = {}
    for text, token_id in ids_of_kinds(token_ids, kinds, TokenKind.BYTE).items():
        if not _BYTE_TOKEN.fullmatch(text):
            raise MalformedFile(
                f"key {TOKENS_KEY!r} spells byte token {token_id} {text!r:.80}, wanted <0x00> to <0xFF>"
            )
        found[byte_of(text)] = token_id
    return found


def byte_of(text: str) -> int:
    """`<0x0A>` is byte 10."""
    return int(text[3:5], 16)


def ids_of_kinds(token_ids: Mapping[str, int], kinds: bytearray, *wanted: TokenKind) -> dict[str, int]:
    """The tokens of the `wanted` kinds. Cost: 2 ms for 49k tokens."""
    return {text: token_id for text, token_id in token_ids.items() if kinds[token_id] in wanted}


def _require(metadata: TokenizerMetadata, key: str) -> None:
    if metadata.get(key) is None:
        raise MalformedFile(f"key {key!r} is missing")


def _check_length(key: str, values: npt.NDArray[np.generic], vocab_size: int) -> None:
    if len(values) != vocab_size:
        raise MalformedFile(f"key {key!r} has {len(values)} elements, the vocabulary has {vocab_size} tokens")
