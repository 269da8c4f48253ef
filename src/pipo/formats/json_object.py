"""JSON objects from strangers: bounded, without a key twice, without the extensions of Python's parser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipo.base.errors import MalformedFile
from pipo.base.page_cache import forget_cached
from pipo.base.units import format_size
from pipo.formats.gguf_header import read_at
from pipo.formats.model_file import DOWNLOAD_AGAIN, open_model_file, refuse_stranger

MAX_FILE_BYTES = 16 << 20
_PART_BYTES = 1 << 20
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
    """A whole file. Raises as `read_object`."""
    return b"".join(_read_parts(path, most_bytes, most_bytes))


@dataclass(frozen=True, slots=True)
class JsonSize:
    """Of a JSON text: what reading it takes depends on how many values it has."""

    num_bytes: int
    num_commas: int
    num_colons: int
    num_lists: int

    @classmethod
    def of(cls, path: Path, most_bytes: int) -> JsonSize:
        """Found without parsing, and without the memory of the whole. Raises as `read_object`."""
        size = cls(0, 0, 0, 0)
        for raw in _read_parts(path, most_bytes, _PART_BYTES):
            size = size + cls(len(raw), raw.count(b","), raw.count(b":"), raw.count(b"["))
        return size

    def __add__(self, other: JsonSize) -> JsonSize:
        return JsonSize(
            self.num_bytes + other.num_bytes,
            self.num_commas + other.num_commas,
            self.num_colons + other.num_colons,
            self.num_lists + other.num_lists,
        )


def _read_parts(path: Path, most_bytes: int, part_bytes: int) -> Iterator[bytes]:
    """A file part by part, which is not left in the page cache; nothing of one that is no JSON at first sight."""
    with open_model_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > most_bytes:
            raise MalformedFile(f"{path}: takes {format_size(num_bytes)}, at most {format_size(most_bytes)} can be")
        stranger = refuse_stranger(path, read_at(file, path, 0, min(32, num_bytes)))
        if stranger is not None:
            raise stranger
        for start in range(0, num_bytes, part_bytes):
            yield read_at(file, path, start, min(part_bytes, num_bytes - start))
        forget_cached(file.fileno(), 0, num_bytes)


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
