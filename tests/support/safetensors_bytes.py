"""Safetensors files written byte by byte, so that a test can get any one of them wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: bytes | str | Mapping[str, object], data: bytes = b"", *, length: int | None = None) -> bytes:
    """`header` as bytes, text or a table. `length` may claim another than it has."""
    text = json.dumps(header) if isinstance(header, Mapping) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def small_file() -> bytes:
    """Two tensors and a note."""
    header = {"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}
    return file_of(header, bytes(range(32)))


def file_with(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None) -> bytes:
    """`arrays` side by side. `dtypes` names what numpy has no type for: BF16 as uint16."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8", "uint8": "U8", "float64": "F64"}
    header, data = {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        dtype = (dtypes or {}).get(name) or names[array.dtype.name]
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    return file_of(header, data)


def write_file(folder: Path, raw: bytes, name: str = "model.safetensors") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path
