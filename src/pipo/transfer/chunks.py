"""Reads cut into chunks: the jobs that workers take, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipo.base.manifest import Extent, FileIdx
from pipo.base.tensor_type import ROWS_PER_GROUP
from pipo.base.units import round_down, round_up
from pipo.store.index import Read, RepackRows
from pipo.transfer.files import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Span:
    """A page-aligned run of file bytes. Of `num_bytes` the first `needed_bytes` must arrive: the file may end after."""

    file_idx: FileIdx
    offset: int
    num_bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class PlainChunk:
    """Goes straight to `place_offset`, which is page-aligned too."""

    span: Span
    place_offset: int


@dataclass(frozen=True, slots=True)
class RepackChunk:
    """Goes to a bounce buffer; the rows that begin `skip_bytes` in are repacked to `place_offset`."""

    span: Span
    place_offset: int
    rows: RepackRows
    num_rows: int
    skip_bytes: int


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Goes to a bounce buffer; `num_bytes` that begin `skip_bytes` in are copied to `out_offset`."""

    span: Span
    out_offset: int
    num_bytes: int
    skip_bytes: int


def cut_reads(reads: Sequence[Read], chunk_bytes: int) -> list[PlainChunk | RepackChunk]:
    """Chunks of about `chunk_bytes`: plain ones at most that, repacked ones plus two page edges, or one group of rows
    where that is more. In file order.
    """
    chunks: list[PlainChunk | RepackChunk] = []
    for read in reads:
        chunks += _cut_plain(read, chunk_bytes) if read.rows is None else _cut_rows(read, read.rows, chunk_bytes)
    return chunks


def cut_copies(extents: Sequence[Extent], max_bytes: int) -> list[RowCopy]:
    """The extents one after another from `out_offset` 0, in pieces of at most `max_bytes`."""
    copies, out_offset = [], 0
    for extent in extents:
        for start in range(0, extent.num_bytes, max_bytes):
            size = min(max_bytes, extent.num_bytes - start)
            span, skip = _span(extent.file_idx, extent.offset + start, size)
            copies.append(RowCopy(span, out_offset + start, size, skip))
        out_offset += extent.num_bytes
    return copies


def _cut_plain(read: Read, chunk_bytes: int) -> Iterator[PlainChunk]:
    extent = read.extent
    begin, end = round_down(extent.offset, ALIGNMENT), round_up(extent.end, ALIGNMENT)
    step = _even_step(end - begin, chunk_bytes, ALIGNMENT)
    for offset in range(begin, end, step):
        size = min(step, end - offset)
        span = Span(extent.file_idx, offset, size, min(size, extent.end - offset))
        yield PlainChunk(span, read.place_offset + offset - extent.offset)


def _cut_rows(read: Read, rows: RepackRows, chunk_bytes: int) -> Iterator[RepackChunk]:
    chunk_rows = max(round_down(chunk_bytes // rows.row_bytes, ROWS_PER_GROUP), ROWS_PER_GROUP)
    step = _even_step(rows.num_rows, chunk_rows, ROWS_PER_GROUP)
    for row in range(0, rows.num_rows, step):
        num_rows = min(step, rows.num_rows - row)
        start = row * rows.row_bytes
        span, skip = _span(read.extent.file_idx, read.extent.offset + start, num_rows * rows.row_bytes)
        yield RepackChunk(span, read.place_offset + start, rows, num_rows, skip)


def _even_step(total: int, largest: int, multiple: int) -> int:
    """Cut `total` into as few pieces as `largest` allows, of even size: a short last read costs a whole turn."""
    num_pieces = max(-(-total // largest), 1)
    return round_up(-(-total // num_pieces), multiple)


def _span(file_idx: FileIdx, offset: int, num_bytes: int) -> tuple[Span, int]:
    """The aligned span around some bytes, and how far into it they begin."""
    begin = round_down(offset, ALIGNMENT)
    needed = offset + num_bytes - begin
    return Span(file_idx, begin, round_up(needed, ALIGNMENT), needed), offset - begin
