"""Safetensors files: the header alone, a table of tensors. Reads no tensor data.

Source: https://github.com/huggingface/safetensors#format. Eight bytes of header length, a JSON object, the data, of
which every byte belongs to one tensor. Files come from strangers: length, types, shapes and offsets are checked before
they are used, so a hostile header costs at most MAX_HEADER_BYTES of reading and about ten times that in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.page_cache import forget_cached
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, format_size
from pipo.formats.gguf_header import read_at
from pipo.formats.json_object import parse_object
from pipo.formats.model_file import DOWNLOAD_AGAIN, open_model_file, refuse_stranger

MAX_HEADER_BYTES = 16 * MIB  # 46k tensors, a DeepSeek V3 in one file, take 6 MB; the format allows 100 MB
MAX_TENSORS = 1 << 16  # of one file
MAX_VALUES = 10 * MAX_TENSORS  # in the JSON: a tensor of three dimensions has nine
MAX_NAME_CHARS = 512
MAX_DIMS = 8
METADATA_KEY = "__metadata__"

_LENGTH_BYTES = 8
_HEAD_BYTES = 32  # enough to tell what else a file may be
_MAX_INT64 = (1 << 63) - 1
_READAHEAD_BYTES = MIB
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}


class Dtype(Enum):
    """An element type, as the file names it, with its size in bits."""

    BOOL = ("BOOL", 8)
    F4 = ("F4", 4)
    F6_E2M3 = ("F6_E2M3", 6)
    F6_E3M2 = ("F6_E3M2", 6)
    U8 = ("U8", 8)
    I8 = ("I8", 8)
    F8_E5M2 = ("F8_E5M2", 8)
    F8_E4M3 = ("F8_E4M3", 8)
    F8_E8M0 = ("F8_E8M0", 8)
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8)
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8)
    I16 = ("I16", 16)
    U16 = ("U16", 16)
    F16 = ("F16", 16)
    BF16 = ("BF16", 16)
    I32 = ("I32", 32)
    U32 = ("U32", 32)
    F32 = ("F32", 32)
    C64 = ("C64", 64)
    F64 = ("F64", 64)
    I64 = ("I64", 64)
    U64 = ("U64", 64)

    @property
    def bits(self) -> int:
        return self.value[1]


_GGML_TYPES = {dtype: TensorType[dtype.name] for dtype in Dtype if dtype.name in TensorType.__members__}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the file has it. `shape` is the file's: slowest dimension first, so (out, in) for a matrix."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int

    @property
    def ggml_type(self) -> TensorType | None:
        return _GGML_TYPES.get(self.dtype)

    def as_spec(self, path: Path, file_idx: FileIdx, name: str | None = None) -> TensorSpec:
        """In ggml's terms. Raises UnsupportedModel for a type that ggml has not, or an empty or scalar tensor."""
        type_ = self.ggml_type
        if type_ is None:
            raise UnsupportedModel(
                f"{path}: tensor {self.name!r} is {self.dtype.name}, which pipo does not compute with",
                hint=f"pipo runs weights in {', '.join(t.name for t in _GGML_TYPES.values() if t.name[0] != 'I')}",
            )
        if not self.shape or 0 in self.shape:
            raise UnsupportedModel(f"{path}: tensor {self.name!r} has shape {self.shape}, wanted one with elements")
        extent = Extent(file_idx, self.offset, self.num_bytes)
        return TensorSpec(name or self.name, type_, self.shape[::-1], extent)


@dataclass(frozen=True, slots=True)
class Safetensors:
    """One file's header. `metadata` is what its writer noted, text by text."""

    path: Path
    identity: FileIdentity
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def open_safetensors(path: Path, *, header_only: bool = False) -> Safetensors:
    """Read the header of `path`. `header_only` takes a file that ends before its weights do.

    Raises: ModelNotFound, UnsupportedModel (another format), MalformedFile (everything else), ReadFailed (the disk).
    Cost: 1 ms for 300 tensors, 0.2 s for 46k.
    """
    with open_model_file(path) as file:
        identity = FileIdentity.of(os.fstat(file.fileno()))
        header_bytes = _header_bytes(path, file, identity.num_bytes)
        raw = read_at(file, path, _LENGTH_BYTES, header_bytes)
        forget_cached(file.fileno(), 0, _LENGTH_BYTES + header_bytes + _READAHEAD_BYTES)
    table, data_start = _parse(path, raw), _LENGTH_BYTES + header_bytes
    metadata = _metadata(path, table.pop(METADATA_KEY, None))
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in table.items()}
    _check_tiling(path, list(tensors.values()), data_start, None if header_only else identity.num_bytes)
    return Safetensors(path, identity, metadata, tensors)


def _header_bytes(path: Path, file: FileIO, file_bytes: int) -> int:
    head = read_at(file, path, 0, min(_HEAD_BYTES, file_bytes))
    stranger = refuse_stranger(path, head)
    if stranger is not None:
        raise stranger
    num_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if len(head) <= _LENGTH_BYTES:
        raise _malformed(path, f"has {len(head)} bytes, a header takes more than {_LENGTH_BYTES}", DOWNLOAD_AGAIN)
    if head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise _malformed(path, f"is not a safetensors file: wanted a header in JSON, found {head[8:12]!r}")
    if num_bytes < 2:
        raise _malformed(path, f"has a header of {num_bytes} bytes, wanted at least 2")
    if num_bytes > MAX_HEADER_BYTES:
        raise _malformed(path, f"has a header of {num_bytes} bytes, at most {format_size(MAX_HEADER_BYTES)} can be")
    if _LENGTH_BYTES + num_bytes > file_bytes:
        raise _malformed(path, f"has a header of {num_bytes} bytes, the file ends at {file_bytes}", DOWNLOAD_AGAIN)
    return num_bytes


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    try:
        return parse_object(raw, MAX_VALUES)
    except ValueError as error:
        raise _malformed(path, f"its header {error}", DOWNLOAD_AGAIN) from None


def _metadata(path: Path, found: object) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _malformed(path, f"has {METADATA_KEY} that is not a table of texts")
    return found


def _tensor(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise _malformed(path, f"has a tensor named {name!r:.80}, which is not a name of 1 to {MAX_NAME_CHARS} letters")
    if not isinstance(entry, dict) or entry.keys() != _TENSOR_KEYS:
        found = ", ".join(sorted(map(repr, entry))) if isinstance(entry, dict) else type(entry).__name__
        raise _wrong(path, name, f"has {found:.80}, wanted 'data_offsets', 'dtype', 'shape'")
    dtype = _dtype(path, name, entry["dtype"])
    shape = _naturals(path, name, "shape", entry["shape"])
    if len(shape) > MAX_DIMS:
        raise _wrong(path, name, f"has {len(shape)} dimensions, at most {MAX_DIMS} can be")
    offsets = _naturals(path, name, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(path, name, f"has data_offsets {list(offsets)!s:.80}, wanted [begin, end]")
    num_bits = prod(shape) * dtype.bits
    if num_bits > 8 * _MAX_INT64:
        raise _wrong(path, name, f"has shape {list(shape)}, more than 2^63 - 1 bytes")
    num_bytes = offsets[1] - offsets[0]
    if num_bits != 8 * num_bytes:
        wanted = f"{num_bits // 8}" if num_bits % 8 == 0 else f"{num_bits / 8:g}"
        raise _wrong(path, name, f"takes {num_bytes} bytes, {dtype.name} of shape {list(shape)} takes {wanted}")
    return StoredTensor(name, dtype, shape, data_start + offsets[0], num_bytes)


def _dtype(path: Path, name: str, found: object) -> Dtype:
    if isinstance(found, str) and found in Dtype.__members__:
        return Dtype[found]
    raise UnsupportedModel(
        f"{path}: tensor {name!r} is of type {found!r:.40}, which this pipo does not know",
        hint=f"known are {', '.join(Dtype.__members__)}",
    )


def _naturals(path: Path, name: str, key: str, found: object) -> tuple[int, ...]:
    if isinstance(found, list) and all(type(item) is int and 0 <= item <= _MAX_INT64 for item in found):
        return tuple(found)
    raise _wrong(path, name, f"has {key} {found!r:.80}, wanted a list of whole numbers from 0")


def _check_tiling(path: Path, tensors: Sequence[StoredTensor], data_start: int, file_bytes: int | None) -> None:
    """Every byte of the data belongs to exactly one tensor. `file_bytes` None: the file may end anywhere."""
    if len(tensors) > MAX_TENSORS:
        raise _malformed(path, f"has {len(tensors)} tensors, at most {MAX_TENSORS} can be")
    in_order = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes))
    if in_order and in_order[0].offset != data_start:
        first = in_order[0]
        raise _wrong(
            path, first.name, f"is the first and starts at byte {first.offset - data_start} of the data, not 0"
        )
    for before, after in pairwise(in_order):
        end = before.offset + before.num_bytes
        if after.offset < end:
            raise _wrong(path, after.name, f"starts at byte {after.offset}, where {before.name!r} lies (to {end})")
        if after.offset > end:
            raise _wrong(path, after.name, f"starts at byte {after.offset}, {before.name!r} before it ends at {end}")
    end = in_order[-1].offset + in_order[-1].num_bytes if in_order else data_start
    if file_bytes is not None and end > file_bytes:
        raise _malformed(path, f"ends at byte {file_bytes}, its tensors at {end}", DOWNLOAD_AGAIN)
    if file_bytes is not None and end < file_bytes:
        raise _malformed(path, f"has {file_bytes - end} bytes behind its last tensor, which ends at {end}")


def _wrong(path: Path, name: str, detail: str) -> MalformedFile:
    return _malformed(path, f"tensor {name!r} {detail}")


def _malformed(path: Path, detail: str, hint: str | None = None) -> MalformedFile:
    return MalformedFile(f"{path}: {detail}", hint=hint)
