"""Where a unit's bytes lie in the file and where they go in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pipo.base.manifest import Extent, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.base.units import round_up

PAGE = 4096
REPACK_ALIGNMENT = 128
_MERGE_GAP = 4096  # a gap cheaper to read than to skip; GGUF pads tensors by less than 32 bytes


@dataclass(frozen=True, slots=True)
class RepackRows:
    """The matrix a read belongs to: its rows are repacked on their way to the place, in whole groups."""

    type: TensorType
    row_elems: int
    num_rows: int

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.row_elems)


@dataclass(frozen=True, slots=True)
class Read:
    """One run of file bytes and where they go in a unit's place.

    A plain read lands at an offset congruent to the file's modulo a page, on pages of its own: direct I/O may fill
    whole pages in place, spilling over both ends. A read with `rows` lands exactly, after repacking.
    """

    extent: Extent
    place_offset: int
    rows: RepackRows | None = None


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """`num_bytes` of a page-aligned place, the reads that fill it, and where each tensor then lies in it."""

    num_bytes: int
    reads: tuple[Read, ...]
    offsets: Mapping[str, int]


def layout_unit(tensors: Sequence[TensorSpec], *, repacked: Collection[str] = ()) -> UnitLayout:
    """Lay tensors out in file order. Neighbours in the file are read as one."""
    reads: list[Read] = []
    offsets: dict[str, int] = {}
    end = 0
    for run in _runs(sorted((t for t in tensors if t.name not in repacked), key=_file_order)):
        first, last = run[0].extent, run[-1].extent
        start = round_up(end, PAGE) + first.offset % PAGE
        reads.append(Read(Extent(first.file_idx, first.offset, last.end - first.offset), start))
        for tensor in run:
            offsets[tensor.name] = start + tensor.extent.offset - first.offset
        end = round_up(start + last.end - first.offset, PAGE)
    for tensor in sorted((t for t in tensors if t.name in repacked), key=_file_order):
        start = round_up(end, REPACK_ALIGNMENT)
        rows = RepackRows(tensor.type, tensor.shape[0], tensor.shape[1])
        reads.append(Read(tensor.extent, start, rows))
        offsets[tensor.name] = start
        end = start + tensor.num_bytes
    return UnitLayout(end, tuple(reads), offsets)


def cut_rows(spec: TensorSpec, max_bytes: int, multiple: int) -> list[TensorSpec]:
    """Cut a matrix (in, out) by output rows into pieces of at most `max_bytes`, whole multiples of rows but the last.

    Raises ValueError when not even `multiple` rows fit.
    """
    row_bytes = spec.type.row_bytes(spec.shape[0])
    rows = max_bytes // row_bytes // multiple * multiple
    if rows < 1:
        raise ValueError(f"{multiple} rows of {spec.name} take {multiple * row_bytes} bytes, the limit is {max_bytes}")
    return [_piece(spec, start, min(start + rows, spec.shape[1])) for start in range(0, spec.shape[1], rows)]


def _piece(spec: TensorSpec, start: int, stop: int) -> TensorSpec:
    row_bytes = spec.type.row_bytes(spec.shape[0])
    extent = Extent(spec.extent.file_idx, spec.extent.offset + start * row_bytes, (stop - start) * row_bytes)
    return replace(spec, name=f"{spec.name}[{start}:{stop}]", shape=(spec.shape[0], stop - start), extent=extent)


def _runs(tensors: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    runs: list[list[TensorSpec]] = []
    for tensor in tensors:
        previous = runs[-1][-1].extent if runs else None
        is_next = previous is not None and previous.file_idx == tensor.extent.file_idx
        if is_next and previous is not None and 0 <= tensor.extent.offset - previous.end < _MERGE_GAP:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _file_order(tensor: TensorSpec) -> tuple[int, int]:
    return tensor.extent.file_idx, tensor.extent.offset
