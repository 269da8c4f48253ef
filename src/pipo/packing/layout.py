"""A packed file before it is written: which tensors, in which order and where, and the header around them.

A standard GGUF, laid out for streaming: first what always stays in RAM, then the embedding table, then the units in the
order of a pass, the tensors of each side by side. Every tensor begins on a page (`general.alignment` = 4096), so that
direct reads and writes need no edges. llama.cpp takes no other padding than that of the alignment, so a unit alone
cannot be aligned; on pages all tensors cost 0.24 % of SmolLM2-135M and nothing of a 7B or 70B, whose tensors are whole
pages anyway.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipo.base.manifest import EMBEDDING_TABLE, Manifest, TensorSpec
from pipo.base.units import PAGE_BYTES
from pipo.formats.gguf_writer import (
    TensorEntry,
    count_entry,
    header_bytes,
    tensor_offsets,
    text_entry,
    texts_entry,
)
from pipo.formats.hyper_parameters import rope_layout
from pipo.models.stage import Stage
from pipo.packing.checksums import ALGORITHM, ALGORITHM_KEY, HEADER_KEY, NO_CHECKSUM, TENSORS_KEY, Hash
from pipo.packing.types import QUANTIZATION_VERSION, Mix, TensorPlan, plan_tensor

ALIGNMENT = PAGE_BYTES
_VERSION_KEY, _VERSION = "pipo.pack.version", 1
ALIGNMENT_KEY, _FILE_TYPE_KEY = "general.alignment", "general.file_type"
_QUANTIZATION_KEY = "general.quantization_version"
_ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.(?:weight|bias)")
# of the source, which are written anew or mean nothing in a file that holds all
REPLACED_KEYS = frozenset(
    {ALIGNMENT_KEY, _FILE_TYPE_KEY, _QUANTIZATION_KEY, "split.no", "split.count", "split.tensors.count"}
)


@dataclass(frozen=True, slots=True)
class PackLayout:
    """The tensors in file order. `offsets` are from the beginning of the file; `num_bytes` is that of the file."""

    tensors: tuple[TensorPlan, ...]
    entries: tuple[bytes, ...]  # all keys but those of the checksums
    offsets: tuple[int, ...]
    num_bytes: int
    data_start: int

    def header(self, checksums: Sequence[str]) -> bytes:
        """The finished header, its own checksum in it."""
        raw = self._header(checksums, NO_CHECKSUM)
        return self._header(checksums, Hash(raw).hexdigest())

    @property
    def fingerprint(self) -> str:
        """Equal for layouts that lead to the same file from the same source."""
        return hashlib.sha256(self._header([NO_CHECKSUM] * len(self.tensors), NO_CHECKSUM)).hexdigest()

    def _header(self, checksums: Sequence[str], of_header: str) -> bytes:
        return header_bytes(_with_checksums(self.entries, checksums, of_header), _table(self.tensors), ALIGNMENT)


def lay_out(manifest: Manifest, stages: Sequence[Stage], mix: Mix, source_entries: Sequence[bytes]) -> PackLayout:
    """`source_entries` are the source's keys but REPLACED_KEYS and those that an earlier pack wrote."""
    moving = {spec.name for stage in stages for spec in stage.specs} | {EMBEDDING_TABLE}
    num_layers = manifest.hyper.num_layers
    tensors = tuple(
        plan_tensor(spec, mix, num_layers, moves=spec.name in moving, head_rows=_head_rows(manifest, spec))
        for spec in in_pass_order(manifest, stages)
    )
    entries = (
        *source_entries,
        count_entry(ALIGNMENT_KEY, ALIGNMENT),
        count_entry(_FILE_TYPE_KEY, mix.file_type),
        count_entry(_QUANTIZATION_KEY, QUANTIZATION_VERSION),
        count_entry(_VERSION_KEY, _VERSION),
    )
    return laid_out(tensors, entries)


def laid_out(tensors: Sequence[TensorPlan], entries: Sequence[bytes]) -> PackLayout:
    """One after another, each on a page. `entries` are all keys but those of the checksums."""
    blank = _with_checksums(entries, [NO_CHECKSUM] * len(tensors), NO_CHECKSUM)
    data_start = len(header_bytes(blank, _table(tensors), ALIGNMENT))
    *offsets, end = tensor_offsets((tensor.num_bytes for tensor in tensors), ALIGNMENT)
    places = tuple(data_start + each for each in offsets)
    return PackLayout(tuple(tensors), tuple(entries), places, data_start + end, data_start)


def in_pass_order(manifest: Manifest, stages: Sequence[Stage]) -> Iterator[TensorSpec]:
    """Vectors, then what no stage moves (the embedding table), then unit after unit. Each once: where the head is the
    embedding table, it lies where the head is read.
    """
    vectors = {spec.name: spec for stage in stages for spec in stage.vectors.values()}
    moving = {spec.name: spec for stage in stages for spec in stage.specs}
    yield from vectors.values()
    yield from (spec for name, spec in manifest.tensors.items() if name not in vectors and name not in moving)
    yield from moving.values()


def _head_rows(manifest: Manifest, spec: TensorSpec) -> int:
    """Rows of a head of queries or keys, where a GGUF has rotated pairs side by side and the source has halves."""
    hyper = manifest.hyper
    is_in_order = hyper.rope.layout is rope_layout(hyper.architecture)
    return 0 if is_in_order or not _ROTATED.fullmatch(spec.name) else hyper.head_dim


def _with_checksums(entries: Sequence[bytes], checksums: Sequence[str], of_header: str) -> list[bytes]:
    return [
        *entries,
        text_entry(ALGORITHM_KEY, ALGORITHM),
        texts_entry(TENSORS_KEY, checksums),
        text_entry(HEADER_KEY, of_header),
    ]


def _table(tensors: Sequence[TensorPlan]) -> list[TensorEntry]:
    offsets = tensor_offsets((tensor.num_bytes for tensor in tensors), ALIGNMENT)
    return [TensorEntry(t.name, t.type, t.source.shape, at) for t, at in zip(tensors, offsets, strict=False)]
