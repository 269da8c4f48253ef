"""Byte-pair encoding with ranked merges (`tokenizer.ggml.model` = gpt2, gemma4), on the `tokenizers` library."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import overload

from tokenizers import Regex
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from pipo.base.errors import MalformedFile
from pipo.text.pretokenizers import PreTokenizer
from pipo.text.vocabulary import TokenizerMetadata

_log = logging.getLogger(__name__)

MERGES_KEY = "tokenizer.ggml.merges"
_CACHED_WORDS = 8192  # at most 256 letters each


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it prints, else the next free one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


class BytePairs:
    """Splits text into words, then joins the pair of lowest rank until none is left. Threads: any.

    A byte that has no token is dropped, as in llama.cpp. SmolLM2 lacks 21; of these only six control characters and
    the first byte of unassigned planes (U+40000 to U+BFFFF) can stand in UTF-8 at all.
    """

    def __init__(self, token_ids: dict[str, int], merges: Sequence[str], pre_tokenizer: PreTokenizer) -> None:
        _check_merges(merges, token_ids)
        self._is_byte_level = pre_tokenizer.is_byte_level
        with _signals_wait():
            model = BPE(
                vocab=token_ids,
                merges=_Pairs(merges),
                cache_capacity=_CACHED_WORDS,
                byte_fallback=not pre_tokenizer.is_byte_level,
                ignore_merges=pre_tokenizer.ignores_merges,
            )
        self._engine = Engine(model)
        if not pre_tokenizer.is_byte_level:
            self._engine.normalizer = Replace(" ", "▁")
        self._engine.pre_tokenizer = PreTokenizers(list(_steps(pre_tokenizer, token_ids)))

    def encode(self, text: str) -> list[int]:
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def token_text(self, token_id: int) -> str:
        return str(self._engine.id_to_token(token_id))

    def plain_bytes(self, text: str) -> bytes:
        """What a normal token stands for."""
        return bytes_of_letters(text) if self._is_byte_level else text.replace("▁", " ").encode()


def bytes_of_letters(text: str) -> bytes:
    """What a token spelled in letters for bytes stands for."""
    try:
        return bytes(_BYTES[letter] for letter in text)
    except KeyError:  # not spelled so: a token that was added as it is
        return text.encode()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM until the block has ended: 0.1 s for 49k merges.

    The library asks for the merges one by one, and swallows, or takes for a wrong type, what a signal's handler raises
    in between. Only the main thread runs handlers, and only it may set them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = {number: handler for number, handler in kept.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def read_merges(metadata: TokenizerMetadata) -> list[str]:
    if metadata.get(MERGES_KEY) is None:
        raise MalformedFile(f"key {MERGES_KEY!r} is missing")
    return metadata.strings(MERGES_KEY)


def _halves(merge: str) -> tuple[str, str]:
    """The first letter may be a space itself."""
    cut = merge.find(" ", 1)
    return (merge[:cut], merge[cut + 1 :]) if cut > 0 else (merge, "")


class _Pairs(Sequence[tuple[str, str]]):
    """Merges as pairs, made when asked for: a list of them would cost 9 MB for 49k merges."""

    def __init__(self, merges: Sequence[str]) -> None:
        self._merges = merges

    def __len__(self) -> int:
        return len(self._merges)

    @overload
    def __getitem__(self, idx: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, idx: slice) -> Sequence[tuple[str, str]]: ...
    def __getitem__(self, idx: int | slice) -> tuple[str, str] | Sequence[tuple[str, str]]:
        return _Pairs(self._merges[idx]) if isinstance(idx, slice) else _halves(self._merges[idx])


def _check_merges(merges: Sequence[str], token_ids: Mapping[str, int]) -> None:
    for idx, merge in enumerate(merges):
        left, right = _halves(merge)
        for piece in (left, right, left + right):
            if piece not in token_ids:
                raise MalformedFile(f"key {MERGES_KEY!r}: merge {idx} is {merge!r}, but there is no token {piece!r}")


def _steps(pre_tokenizer: PreTokenizer, token_ids: Mapping[str, int]) -> Iterator[Split | ByteLevel]:
    for pattern in pre_tokenizer.patterns:
        yield Split(Regex(pattern), "isolated")
    if not pre_tokenizer.is_byte_level:
        return
    yield ByteLevel(add_prefix_space=False, use_regex=False)
    missing = [letter for letter in _LETTERS if letter not in token_ids]
    if missing:  # what is dropped must still keep its neighbours apart
        _log.info("bytes_without_token=%d effect=dropped_from_input", len(missing))
        yield Split(Regex(f"[{''.join(map(re.escape, missing))}]"), "isolated")
