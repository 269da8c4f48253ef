"""GGUF files: metadata and the tensor table. Reads no tensor data.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3, little endian, also in shards
(`model-00001-of-00003.gguf`). Files come from strangers: every count, length and offset is checked against the file's
size before it is used, so a hostile header costs at most MAX_HEADER_BYTES of reading and MAX_TEXT_BYTES of memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from pipo.base.errors import MalformedFile, ModelNotFound, UnsupportedModel
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.page_cache import forget_cached
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, round_up
from pipo.formats.gguf_header import INCOMPLETE, HeaderReader
from pipo.formats.gguf_metadata import ArrayRef, GgufMetadata, read_entries, walk_entries
from pipo.formats.model_file import check_unchanged, open_model_file, refuse_not_gguf

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = MIB
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 and counts the closing zero
MAX_TENSORS = 1 << 17  # DeepSeek V3 with one tensor per expert would have 46k
MAX_SHARDS = 4096

_HEADER_BYTES = 4 + 4 + 8 + 8
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # a one-letter name, one dimension
_MAX_INT64 = (1 << 63) - 1
_READAHEAD_BYTES = MIB  # Linux reads a little ahead of us; its default is 128 KiB
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SPLIT_NO, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True, slots=True)
class Gguf:
    """An opened model: one file, or all shards of one. `metadata` is that of the first."""

    files: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]  # of `files`
    metadata: GgufMetadata
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class _Split:
    """A file's claim to be shard `idx` (from 0) of `count`, which hold `num_tensors` together."""

    idx: int
    count: int
    num_tensors: int


@dataclass(frozen=True, slots=True)
class _Shard:
    metadata: GgufMetadata
    split: _Split | None
    tensors: dict[str, TensorSpec]

    @property
    def path(self) -> Path:
        return self.metadata.path


def open_gguf(path: Path, *, header_only: bool = False) -> Gguf:
    """Read the header of `path`, and those of its sister shards where there are any; any shard opens the set.

    `header_only` takes a file that ends before its weights do: enough to plan with, never to run.

    Raises: ModelNotFound (no such file, missing shards), UnsupportedModel (another format, version, byte order or
    tensor type), MalformedFile (everything else), ReadFailed (the disk).
    Cost: 12 ms for 49k tokens, 49k merges and 272 tensors. Memory: one window of 256 KiB, and what it returns.
    """
    opened = _read_shard(path, header_only=header_only)
    if opened.split is None:
        return Gguf((path,), (opened.metadata.identity,), opened.metadata, opened.tensors)
    paths = _shard_paths(path, opened.split)
    shards = (
        opened if p == path else _read_shard(p, FileIdx(idx), header_only=header_only) for idx, p in enumerate(paths)
    )
    return _join(paths, shards, opened.split)


def entry_spans(metadata: GgufMetadata) -> dict[str, tuple[int, int]]:
    """Where each key with its value lies in the metadata's file: offset and bytes. Reads the header again.

    Raises: as `open_gguf`, and FileChanged where the file is another one by now.
    """
    with open_model_file(metadata.path) as file:
        check_unchanged(metadata.path, file, metadata.identity, offset=0, num_bytes=_HEADER_BYTES)
        reader = HeaderReader(file, metadata.path, metadata.identity.num_bytes)
        try:
            _, num_keys = _read_counts(reader)
            return {key: (start, reader.position - start) for key, _, start in walk_entries(reader, num_keys)}
        finally:
            forget_cached(file.fileno(), 0, reader.position + _READAHEAD_BYTES)


def has_whole_header(path: Path) -> bool:
    """Whether a file that has only begun to arrive has its header: that of one shard, not of its sisters.

    Raises UnsupportedModel, MalformedFile, ReadFailed for what no further bytes would mend.
    """
    try:
        _read_shard(path, header_only=True)
    except MalformedFile as error:
        if error.hint == INCOMPLETE:
            return False
        raise
    return True


def _read_shard(path: Path, file_idx: FileIdx | None = None, *, header_only: bool) -> _Shard:
    with open_model_file(path) as file:
        identity = FileIdentity.of(os.fstat(file.fileno()))
        reader = HeaderReader(file, path, identity.num_bytes)
        try:
            num_tensors, num_keys = _read_counts(reader)
            metadata = GgufMetadata(path, identity, read_entries(reader, num_keys))
            split = _split_of(metadata)
            if file_idx is None:
                file_idx = FileIdx(0 if split is None else split.idx)
            tensors = _read_tensors(reader, num_tensors, _alignment_of(metadata), file_idx)
            if not header_only:
                _check_end(reader, tensors.values())
        finally:
            forget_cached(file.fileno(), 0, reader.position + _READAHEAD_BYTES)
    return _Shard(metadata, split, tensors)


def _read_counts(reader: HeaderReader) -> tuple[int, int]:
    head = reader.take(min(_HEADER_BYTES, reader.file_bytes))
    if not head.startswith(MAGIC):
        raise refuse_not_gguf(reader.path, head)
    if len(head) < _HEADER_BYTES:
        raise reader.malformed(f"takes {_HEADER_BYTES} bytes, the file has {len(head)}")
    _check_version(reader, head[4:8])
    return int.from_bytes(head[8:16], "little"), int.from_bytes(head[16:24], "little")


def _check_version(reader: HeaderReader, raw: bytes) -> None:
    version = int.from_bytes(raw, "little")
    if version in (2, 3):
        return
    if version == 0:
        raise reader.malformed("has version 0, wanted 2 or 3")
    if version & 0xFFFF == 0:
        raise UnsupportedModel(
            f"{reader.path}: is a big-endian GGUF file, wanted little-endian",
            hint="convert it with gguf_convert_endian.py of the gguf package",
        )
    raise UnsupportedModel(
        f"{reader.path}: is GGUF version {version}, wanted 2 or 3",
        hint="convert the model again with a current llama.cpp" if version == 1 else "a newer pipo may read it",
    )


def _alignment_of(metadata: GgufMetadata) -> int:
    alignment = metadata.integer("general.alignment")
    if alignment is None:
        return DEFAULT_ALIGNMENT
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise MalformedFile(
            f"{metadata.path}: key 'general.alignment' is {alignment}, wanted a power of two from 8 to {MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensors(reader: HeaderReader, count: int, alignment: int, file_idx: FileIdx) -> dict[str, TensorSpec]:
    reader.subject = "the header"
    if count > MAX_TENSORS:
        raise reader.malformed(f"claims {count} tensors, at most {MAX_TENSORS} can be")
    reader.require_items(count, _LEAST_TENSOR_BYTES, "tensors")
    table: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for idx in range(count):
        reader.subject = f"tensor {idx + 1} of {count}"
        name = _read_name(reader)
        if name in table:
            raise reader.malformed("is there twice")
        table[name] = (*_read_shape_and_type(reader), _read_offset(reader, alignment))
    data_start = round_up(reader.position, alignment)
    tensors = {
        name: TensorSpec(name, type_, shape, Extent(file_idx, data_start + offset, type_.nbytes(shape)))
        for name, (type_, shape, offset) in table.items()
    }
    _check_overlaps(reader, tensors.values())
    return tensors


def _read_name(reader: HeaderReader) -> str:
    name = reader.text("name", MAX_NAME_BYTES)
    if not name or "\0" in name:
        raise reader.malformed(f"is named {name!r}, which is not a name")
    reader.subject = f"tensor {name!r}"
    return name


def _read_shape_and_type(reader: HeaderReader) -> tuple[TensorType, tuple[int, ...]]:
    num_dims = reader.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.malformed(f"has {num_dims} dimensions, wanted 1 to {MAX_DIMS}")
    shape = tuple(reader.u64() for _ in range(num_dims))
    if 0 in shape:
        raise reader.malformed(f"has shape {shape}, with a dimension of 0")
    if prod(shape) > _MAX_INT64:
        raise reader.malformed(f"has shape {shape}, more than 2^63 - 1 elements")
    type_ = _tensor_type(reader, reader.u32())
    if shape[0] % type_.block_elems:
        raise reader.malformed(f"has rows of {shape[0]}, {type_.name} wants a multiple of {type_.block_elems}")
    if type_.nbytes(shape) > _MAX_INT64:
        raise reader.malformed(f"has shape {shape}, more than 2^63 - 1 bytes")
    return type_, shape


def _tensor_type(reader: HeaderReader, number: int) -> TensorType:
    try:
        return TensorType(number)
    except ValueError:
        raise UnsupportedModel(
            f"{reader.path}: {reader.subject} has type {number}, which this pipo does not know",
            hint="types 4, 5, 31-33 and 36-38 were removed from ggml: convert the model again; "
            f"types above {max(TensorType)} want a newer pipo",
        ) from None


def _read_offset(reader: HeaderReader, alignment: int) -> int:
    offset = reader.u64()
    if offset % alignment:
        raise reader.malformed(f"starts at {offset} of the data, wanted a multiple of {alignment}")
    return offset


def _check_end(reader: HeaderReader, tensors: Iterable[TensorSpec]) -> None:
    """Every tensor lies inside the file."""
    for tensor in sorted(tensors, key=lambda tensor: tensor.extent.offset):
        if tensor.extent.end > reader.file_bytes:
            reader.subject = f"tensor {tensor.name!r}"
            raise reader.malformed(
                f"takes bytes {tensor.extent.offset} to {tensor.extent.end}, the file ends at {reader.file_bytes}",
                hint="the file is incomplete: download it again",
            )


def _check_overlaps(reader: HeaderReader, tensors: Iterable[TensorSpec]) -> None:
    in_order = sorted(tensors, key=lambda tensor: tensor.extent.offset)
    for before, after in pairwise(in_order):
        if after.extent.offset < before.extent.end:
            reader.subject = f"tensor {after.name!r}"
            raise reader.malformed(
                f"starts at byte {after.extent.offset}, where {before.name!r} lies (to {before.extent.end})"
            )


def _split_of(metadata: GgufMetadata) -> _Split | None:
    count = metadata.integer(_SPLIT_COUNT)
    named = _SHARD_NAME.fullmatch(metadata.path.name)
    if count is None or count in (0, 1):
        if named and int(named[3]) > 1:
            raise MalformedFile(
                f"{metadata.path}: is named shard {named[2]} of {named[3]}, key {_SPLIT_COUNT!r} is {count}",
                hint="rename the file if it is the whole model",
            )
        return None
    idx, num_tensors = metadata.integer(_SPLIT_NO), metadata.integer(_SPLIT_TENSORS)
    if idx is None or num_tensors is None or not 0 <= idx < count <= MAX_SHARDS:
        raise MalformedFile(
            f"{metadata.path}: {_SPLIT_NO} {idx}, {_SPLIT_COUNT} {count} and {_SPLIT_TENSORS} {num_tensors} "
            f"do not make a shard (of at most {MAX_SHARDS})"
        )
    return _Split(idx, count, num_tensors)


def _shard_paths(path: Path, split: _Split) -> tuple[Path, ...]:
    """The names of all shards, from the name of one. Raises ModelNotFound naming those that are missing."""
    named = _SHARD_NAME.fullmatch(path.name)
    own_name = f"-{split.idx + 1:05}-of-{split.count:05}.gguf"
    if named is None or not path.name.endswith(own_name):
        raise MalformedFile(
            f"{path}: holds shard {split.idx + 1} of {split.count}, so its name must end in {own_name}",
            hint="give the shards their names back, or join them with gguf-split --merge",
        )
    paths = tuple(path.with_name(f"{named[1]}-{idx + 1:05}-of-{split.count:05}.gguf") for idx in range(split.count))
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ModelNotFound(
            f"{path}: {len(missing)} of its {split.count} shards are missing: {', '.join(missing[:8])}{more}",
            hint="all shards must lie in the same folder",
        )
    return paths


def _join(paths: tuple[Path, ...], shards: Iterator[_Shard], split: _Split) -> Gguf:
    first = next(shards)
    _check_shard(first, first, 0, split)
    tensors, identities = first.tensors, [first.metadata.identity]
    for idx, shard in enumerate(shards, 1):
        _check_shard(shard, first, idx, split)
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise MalformedFile(f"{shard.path}: tensor {min(twice)!r} is also in an earlier shard")
        tensors |= shard.tensors
        identities.append(shard.metadata.identity)
        if len(tensors) > MAX_TENSORS:
            raise MalformedFile(f"{shard.path}: brings the tensors to {len(tensors)}, at most {MAX_TENSORS} can be")
    if len(tensors) != split.num_tensors:
        raise MalformedFile(
            f"{first.path}: its {split.count} shards hold {len(tensors)} tensors, {_SPLIT_TENSORS} says "
            f"{split.num_tensors}",
            hint="a shard may be of another model",
        )
    return Gguf(paths, tuple(identities), first.metadata, tensors)


def _check_shard(shard: _Shard, first: _Shard, idx: int, split: _Split) -> None:
    """`shard` claims to be the one its name says, of the same model as `first`."""
    wanted = _Split(idx, split.count, split.num_tensors)
    if shard.split != wanted:
        raise MalformedFile(
            f"{shard.path}: wanted shard {wanted.idx + 1} of {wanted.count} with {wanted.num_tensors} tensors in all, "
            f"found {_describe_split(shard.split)}",
            hint="a shard may be of another model",
        )
    for key, value in shard.metadata.entries.items():
        if key == _SPLIT_NO or key == "general.alignment" or isinstance(value, ArrayRef):
            continue
        wanted_value = first.metadata.get(key)
        if wanted_value is not None and wanted_value != value:
            raise MalformedFile(
                f"{shard.path}: key {key!r:.80} is {value!r:.80}, {first.path.name} says {wanted_value!r:.80}",
                hint="the shard is of another model",
            )


def _describe_split(split: _Split | None) -> str:
    if split is None:
        return "a file that is not a shard"
    return f"shard {split.idx + 1} of {split.count} with {split.num_tensors}"
