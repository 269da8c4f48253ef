"""GGUF's key-value section: scalars as Python values, arrays as byte ranges that are read when asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.file_identity import FileIdentity
from pipo.base.page_cache import forget_cached
from pipo.formats.gguf_header import MAX_TEXT_BYTES, HeaderReader, read_at
from pipo.formats.model_file import check_unchanged, open_model_file

Scalar = int | float | bool | str

MAX_KEY_BYTES = 65535  # the format's own limit
MAX_KEYS = 1 << 16
_LEAST_ENTRY_BYTES = 8 + 1 + 4 + 1  # a one-letter key, its type, one byte of value

_STRING_LENGTH = struct.Struct("<Q")


class ValueType(IntEnum):
    """The type of a metadata value, numbered as in the GGUF specification."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
_STRUCTS = {value_type: struct.Struct(fmt) for value_type, fmt in _FORMATS.items()}
_DTYPES = {value_type: np.dtype(fmt) for value_type, fmt in _FORMATS.items()}


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """Where an array's elements lie in the file; `num_bytes` covers all of them, string lengths included."""

    element_type: ValueType
    count: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """The keys of one GGUF file.

    Scalars are in memory; `array`, `strings` and `byte_strings` open the file again, and raise FileChanged when it is
    no longer the same. A key that is missing or of another type is a MalformedFile. Threads: any.
    """

    path: Path
    identity: FileIdentity
    entries: Mapping[str, Scalar | ArrayRef]

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, key: str) -> Scalar | ArrayRef | None:
        return self.entries.get(key)

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_type(key, "a string")

    def integer(self, key: str) -> int | None:
        value = self.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong_type(key, "an integer")

    def number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None or isinstance(value, float):
            return value
        raise self._wrong_type(key, "a float")

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong_type(key, "a bool")

    def array_ref(self, key: str) -> ArrayRef:
        """Type, count and place of an array, without reading it."""
        value = self.get(key)
        if isinstance(value, ArrayRef):
            return value
        raise self._wrong_type(key, "an array")

    def array(self, key: str) -> np.ndarray:
        """A numeric or bool array. Cost: one read, one copy."""
        ref = self.array_ref(key)
        if ref.element_type not in _DTYPES:
            raise self._wrong_type(key, "an array of numbers")
        values = np.frombuffer(self._read(ref), dtype=_DTYPES[ref.element_type])
        if ref.element_type is not ValueType.BOOL:
            return values
        if values.max(initial=0) > 1:
            raise MalformedFile(f"{self.path}: key {key!r} has a bool of {values.max()}, wanted 0 or 1")
        return values.astype(np.bool_)

    def byte_strings(self, key: str) -> list[bytes]:
        """A string array as it is in the file. Cost: one read, then 0.15 µs a string."""
        ref = self.array_ref(key)
        if ref.element_type is not ValueType.STRING:
            raise self._wrong_type(key, "an array of strings")
        data = self._read(ref)
        strings: list[bytes] = []
        cursor = 0
        for _ in range(ref.count):
            start = cursor + 8
            cursor = start + _STRING_LENGTH.unpack_from(data, cursor)[0]
            strings.append(data[start:cursor])
        return strings

    def strings(self, key: str) -> list[str]:
        """A string array, decoded. Raises MalformedFile where one is not UTF-8."""
        raw = self.byte_strings(key)
        try:
            return [item.decode("utf-8") for item in raw]
        except UnicodeDecodeError as error:
            raise MalformedFile(
                f"{self.path}: key {key!r} has a string that is not UTF-8: {error.object!r:.80}"
            ) from None

    def _read(self, ref: ArrayRef) -> bytes:
        with open_model_file(self.path) as file:
            check_unchanged(self.path, file, self.identity, offset=ref.offset, num_bytes=ref.num_bytes)
            data = read_at(file, self.path, ref.offset, ref.num_bytes)
            forget_cached(file.fileno(), 0, ref.offset + ref.num_bytes)
        return data

    def _wrong_type(self, key: str, wanted: str) -> MalformedFile:
        found = describe_value(self.get(key))
        return MalformedFile(f"{self.path}: key {key!r} is {found}, wanted {wanted}")


def describe_value(value: object) -> str:
    """For an error message: what a metadata value is."""
    if value is None:
        return "missing"
    if isinstance(value, ArrayRef):
        return f"an array of {value.count} {value.element_type.name}"
    if isinstance(value, str):
        return "a string"
    return f"the {type(value).__name__} {value}"


def read_entries(reader: HeaderReader, count: int) -> dict[str, Scalar | ArrayRef]:
    """Read `count` keys with their values."""
    return {key: value for key, value, _ in walk_entries(reader, count)}


def walk_entries(reader: HeaderReader, count: int) -> Iterator[tuple[str, Scalar | ArrayRef, int]]:
    """`count` keys with their values, and the offset in the file where each begins; it ends where the reader is."""
    if count > MAX_KEYS:
        raise reader.malformed(f"claims {count} keys, at most {MAX_KEYS} can be")
    reader.require_items(count, _LEAST_ENTRY_BYTES, "keys")
    seen: set[str] = set()
    for idx in range(count):
        reader.subject = f"key {idx + 1} of {count}"
        start = reader.position
        key = reader.text("key", MAX_KEY_BYTES)
        if not key or "\0" in key:
            raise reader.malformed(f"is named {key!r:.80}, which is not a name")
        reader.subject = f"key {key!r:.80}"
        if key in seen:
            raise reader.malformed("is there twice")
        seen.add(key)
        yield key, _read_value(reader, _read_type(reader)), start


def _read_type(reader: HeaderReader) -> ValueType:
    number = reader.u32()
    try:
        return ValueType(number)
    except ValueError:
        raise reader.malformed(f"has value type {number}, the types are 0 to {max(ValueType)}") from None


def _read_value(reader: HeaderReader, value_type: ValueType) -> Scalar | ArrayRef:
    if value_type is ValueType.ARRAY:
        return _read_array_ref(reader)
    if value_type is ValueType.STRING:
        return reader.text("value", MAX_TEXT_BYTES)
    packed = _STRUCTS[value_type]
    value: int | float = packed.unpack(reader.take(packed.size))[0]
    if value_type is not ValueType.BOOL:
        return value
    if value not in (0, 1):
        raise reader.malformed(f"is a bool of {value}, wanted 0 or 1")
    return value == 1


def _read_array_ref(reader: HeaderReader) -> ArrayRef:
    element_type = _read_type(reader)
    count = reader.u64()
    offset = reader.position
    if element_type is ValueType.ARRAY:
        raise UnsupportedModel(f"{reader.path}: {reader.subject} is an array of arrays")
    if element_type is ValueType.STRING:
        reader.require_items(count, 8, "strings")
        reader.skip_strings(count)
    else:
        element_bytes = _STRUCTS[element_type].size
        reader.require_items(count, element_bytes, "numbers")
        reader.skip(count * element_bytes)
    return ArrayRef(element_type, count, offset, reader.position - offset)
