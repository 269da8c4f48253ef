"""Token ids of a file of any length, in the memory that a few pages of it take."""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from pipo.base.errors import UsageError
from pipo.text.contract import ModelTokenizer

_READ_BYTES = 1 << 14
_LEAST_CHARS = 8192  # of a piece that is encoded by itself; the library takes up to 800 bytes a token meanwhile
_MOST_CHARS = 32768  # in which there must be a place to cut
_CHECKED_CHARS = 160  # before and after a cut
# behind a line end before a letter, or before a space and a letter: nearly every pre-tokenizer has a border there
_PLACES = re.compile(r"(?<=\S\n)(?=[^\W\d_])|(?<=\S)(?= [^\W\d_])")


def encode_file(path: Path, tokenizer: ModelTokenizer, max_tokens: int) -> array[int]:
    """The begin token, where the model adds one, and the tokens of a UTF-8 text, up to `max_tokens`.

    As llama.cpp's `llama-perplexity -f`: special-token text is plain text, a newline at the end of the file is left
    out, no end token follows. Raises UsageError where the file is empty, not UTF-8 or cannot be read, or has no place
    to cut it at in 32768 characters.
    """
    ids = array("i", tokenizer.begin_ids)
    texts = _pieces(path, _texts(path), tokenizer)
    for i, text in enumerate(texts):
        ids.extend(tokenizer.encode_part(text, is_first=i == 0))
        if len(ids) >= max_tokens:
            return ids[:max_tokens]
    if len(ids) == len(tokenizer.begin_ids):
        raise UsageError(f"{path}: is empty", hint="perplexity wants a text of some thousand words")
    return ids


def _texts(path: Path) -> Iterator[str]:
    """As it is read, without a newline at its end."""
    decoder, held, done = codecs.getincrementaldecoder("utf-8")(), "", 0
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                text = held + decoder.decode(data)
                held = "\n" if text.endswith("\n") else ""
                yield text.removesuffix("\n")
                done += len(data)
        yield held[1:] + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        start = done - len(decoder.getstate()[0]) + error.start
        raise UsageError(
            f"{path}: is not UTF-8 text: byte {start} is 0x{error.object[error.start]:02X}", hint="save it as UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _pieces(path: Path, texts: Iterator[str], tokenizer: ModelTokenizer) -> Iterator[str]:
    """Cut where tokens end: the ids of all together are those of the whole text."""
    left = ""
    for text in texts:
        left += text
        while len(left) >= _LEAST_CHARS + _CHECKED_CHARS:
            cut = _find_cut(left, tokenizer)
            if cut is None and len(left) > _MOST_CHARS:
                raise UsageError(
                    f"{path}: has {_MOST_CHARS} characters without a border between words",
                    hint="a text of words and lines is wanted",
                )
            if cut is None:
                break
            yield left[:cut]
            left = left[cut:]
    if left:
        yield left


def _find_cut(text: str, tokenizer: ModelTokenizer) -> int | None:
    """The first place from _LEAST_CHARS on at which the tokens around it are the same, cut or whole."""
    for place in _PLACES.finditer(text, _LEAST_CHARS, len(text) - _CHECKED_CHARS):
        cut = place.start()
        before, after = text[cut - _CHECKED_CHARS : cut], text[cut : cut + _CHECKED_CHARS]
        apart = tokenizer.encode_part(before) + tokenizer.encode_part(after)
        if tokenizer.encode_part(before + after) == apart:
            return cut
    return None
