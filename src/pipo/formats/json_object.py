"""JSON objects from strangers: bounded, without a key twice, without the extensions of Python's parser."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

from pipo.base.errors import MalformedFile
from pipo.base.page_cache import forget_cached
from pipo.base.units import format_size
from pipo.formats.gguf_header import read_at
from pipo.formats.model_file import DOWNLOAD_AGAIN, open_model_file, refuse_stranger

MAX_FILE_BYTES = 16 << 20
MAX_VALUES = 1 << 19  # of one file: a shard index of 46k tensors has as many


def read_object(path: Path, most_bytes: int = MAX_FILE_BYTES) -> dict[str, object]:
    """A file that holds one JSON object. Raises ModelNotFound, MalformedFile, ReadFailed.

    Cost: ten times the file's size in memory meanwhile, at most.
    """
    raw = read_bytes(path, most_bytes)
    try:
        return parse_object(raw, MAX_VALUES)
    except ValueError as error:
        raise MalformedFile(f"{path}: {error}", hint=DOWNLOAD_AGAIN) from None


def read_text(path: Path, most_bytes: int = MAX_FILE_BYTES) -> str:
    """Raises as `read_object`."""
    try:
        return read_bytes(path, most_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{path}: is not UTF-8 text: byte {error.start}", hint=DOWNLOAD_AGAIN) from None


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A whole file, which is not left in the page cache."""
    with open_model_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > most_bytes:
            raise MalformedFile(f"{path}: takes {format_size(num_bytes)}, at most {format_size(most_bytes)} can be")
        raw = read_at(file, path, 0, num_bytes)
        forget_cached(file.fileno(), 0, num_bytes)
    stranger = refuse_stranger(path, raw[:32])
    if stranger is not None:
        raise stranger
    return raw


def parse_object(raw: bytes, most_values: int) -> dict[str, object]:
    """Raises ValueError saying what is wrong, as in "has 'a' twice"."""
    num_values = count_values(raw)
    if num_values > most_values:
        raise ValueError(f"has {num_values} values, at most {most_values} can be")
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start}") from None
    except _TwiceError as error:
        raise ValueError(f"has {error.key!r:.80} twice") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"is JSON, but {type(found).__name__} in place of an object")
    return found


def count_values(raw: bytes) -> int:
    """No fewer than there are, counted without parsing."""
    return sum(raw.count(sign) for sign in (b",", b"[", b"{"))


class _TwiceError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for key, value in pairs:
        if key in table:
            raise _TwiceError(key)
        table[key] = value
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")
