"""The bytes of a GGUF header: entries made or copied from another file, the tensor table, padding.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp takes a file only where each tensor begins
at the sum of the sizes before it, every one rounded up to the alignment: `tensor_offsets` lays them so.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipo.base.page_cache import forget_cached
from pipo.base.tensor_type import TensorType
from pipo.base.units import round_up
from pipo.formats.gguf import DEFAULT_ALIGNMENT, MAGIC, entry_spans
from pipo.formats.gguf_header import read_at
from pipo.formats.gguf_metadata import GgufMetadata, Scalar, ValueType
from pipo.formats.model_file import check_unchanged, open_model_file

KeyValue = Scalar | Sequence[str] | npt.NDArray[np.generic]

VERSION = 3
_ELEMENT_TYPES = {"int32": ValueType.INT32, "float32": ValueType.FLOAT32}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A line of the tensor table. `offset` is from the beginning of the data."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int

    def to_bytes(self) -> bytes:
        sizes = struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *self.shape)
        return _text(self.name) + sizes + struct.pack("<IQ", self.type, self.offset)


def tensor_offsets(sizes: Iterable[int], alignment: int = DEFAULT_ALIGNMENT) -> list[int]:
    """Where tensors of these sizes begin, and at the end how long the data is."""
    offsets = [0]
    for size in sizes:
        offsets.append(round_up(offsets[-1] + size, alignment))
    return offsets


def header_bytes(entries: Sequence[bytes], tensors: Sequence[TensorEntry], alignment: int) -> bytes:
    """A whole header, padded to where the data begins. `general.alignment` is the caller's to name."""
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries))
    parts = [head, *entries, *(tensor.to_bytes() for tensor in tensors)]
    padding = bytes(-sum(map(len, parts)) % alignment)
    return b"".join((*parts, padding))


def count_entry(key: str, value: int) -> bytes:
    return _text(key) + struct.pack("<II", ValueType.UINT32, value)


def text_entry(key: str, value: str) -> bytes:
    return _text(key) + struct.pack("<I", ValueType.STRING) + _text(value)


def texts_entry(key: str, values: Sequence[str]) -> bytes:
    head = struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(values))
    return _text(key) + head + b"".join(map(_text, values))


def entry(key: str, value: KeyValue) -> bytes:
    """Of a key whose type in GGUF is that of its value in Python: counts are UINT32, numbers FLOAT32; arrays of texts,
    or of INT32 and FLOAT32 as their dtype says.
    """
    match value:
        case bool():
            return _text(key) + struct.pack("<I?", ValueType.BOOL, value)
        case int():
            return count_entry(key, value)
        case float():
            return _text(key) + struct.pack("<If", ValueType.FLOAT32, value)
        case str():
            return text_entry(key, value)
        case np.ndarray():
            head = struct.pack("<IIQ", ValueType.ARRAY, _ELEMENT_TYPES[value.dtype.name], len(value))
            return _text(key) + head + value.astype(value.dtype.newbyteorder("<")).tobytes()
        case _:
            return texts_entry(key, value)


def spans_to_copy(metadata: GgufMetadata, *, without: Collection[str], prefix: str) -> list[tuple[int, int]]:
    """Offset and bytes of the entries that are not in `without` and do not begin with `prefix`, in file order."""
    spans = entry_spans(metadata)
    return [span for key, span in spans.items() if key not in without and not key.startswith(prefix)]


def copy_entries(metadata: GgufMetadata, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Entries as they stand in the file. Raises FileChanged, ReadFailed."""
    with open_model_file(metadata.path) as file:
        check_unchanged(metadata.path, file, metadata.identity, offset=0, num_bytes=sum(size for _, size in spans))
        try:
            return [read_at(file, metadata.path, offset, size) for offset, size in spans]
        finally:
            forget_cached(file.fileno(), 0, max((offset + size for offset, size in spans), default=0))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
