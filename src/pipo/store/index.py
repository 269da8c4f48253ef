"""Which file bytes a unit is made of, and where each of them lies in the unit's place. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipo.base.manifest import Extent, TensorSpec
from pipo.base.tensor_type import ROWS_PER_GROUP, TensorType
from pipo.base.units import PAGE_BYTES, round_down, round_up

# Two extents this close are one read: keeping them apart would cost the place a page edge anyway.
MAX_GAP_BYTES = PAGE_BYTES
TENSOR_ALIGNMENT = 128  # of repacked tensors; CUDA's is the strictest of ggml's backends


@dataclass(frozen=True, slots=True)
class RepackRows:
    """The rows of one tensor that change layout on their way from the file to the place. The size stays the same."""

    type: TensorType
    row_bytes: int
    num_rows: int
    row_elems: int


@dataclass(frozen=True, slots=True)
class Read:
    """One run of file bytes and where they go in a unit's place.

    A plain run (`rows` is None) keeps its offset within a page and owns every page it touches in the place, so direct
    I/O may fill whole pages and overwrite the edges. A repacked run owns exactly its bytes.
    """

    extent: Extent  # the exact bytes wanted, unaligned
    place_offset: int  # where the extent's first byte lands, from the place's page-aligned base
    rows: RepackRows | None = None


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """How a unit lies in its place. `num_bytes` is the place it needs; `offsets` are by tensor name."""

    num_bytes: int
    reads: tuple[Read, ...]
    offsets: Mapping[str, int]


def layout_unit(tensors: Sequence[TensorSpec], *, repacked: Collection[str] = ()) -> UnitLayout:
    """Lay tensors side by side in file order: first the plain ones, in runs, then those named in `repacked`."""
    assert len({t.name for t in tensors}) == len(tensors), "a unit names a tensor twice"
    in_file_order = sorted(tensors, key=lambda t: (t.extent.file_idx, t.extent.offset))
    reads: list[Read] = []
    offsets: dict[str, int] = {}
    end = 0
    for run in _runs(t for t in in_file_order if t.name not in repacked):
        read = _plain_read(run, end)
        reads.append(read)
        offsets |= {t.name: read.place_offset + t.extent.offset - read.extent.offset for t in run}
        end = round_up(read.place_offset + read.extent.num_bytes, PAGE_BYTES)
    for tensor in (t for t in in_file_order if t.name in repacked):
        read = Read(tensor.extent, round_up(end, TENSOR_ALIGNMENT), _rows_of(tensor))
        reads.append(read)
        offsets[tensor.name] = read.place_offset
        end = read.place_offset + read.extent.num_bytes
    reads.sort(key=lambda r: (r.extent.file_idx, r.extent.offset))
    return UnitLayout(end, tuple(reads), offsets)


def cut_rows(spec: TensorSpec, max_bytes: int, multiple: int) -> list[TensorSpec]:
    """Cut a matrix by rows into even pieces of at most `max_bytes`, each a multiple of `multiple` rows but the last.

    Pieces are named `output.weight[0:4096]`; a matrix that fits stays as it is. A piece has at least `multiple` rows,
    even where those exceed `max_bytes`.
    """
    assert len(spec.shape) == 2, "only a matrix can be cut"
    num_rows = spec.shape[1]
    if spec.num_bytes <= max_bytes:
        return [spec]
    row_bytes = spec.type.row_bytes(spec.shape[0])
    largest = max(round_down(max_bytes // row_bytes, multiple), multiple)
    num_pieces = -(-num_rows // largest)
    piece_rows = round_up(-(-num_rows // num_pieces), multiple)
    return [_piece(spec, start, min(start + piece_rows, num_rows)) for start in range(0, num_rows, piece_rows)]


def _piece(spec: TensorSpec, start: int, stop: int) -> TensorSpec:
    row_bytes = spec.type.row_bytes(spec.shape[0])
    extent = Extent(spec.extent.file_idx, spec.extent.offset + start * row_bytes, (stop - start) * row_bytes)
    return replace(spec, name=f"{spec.name}[{start}:{stop}]", shape=(spec.shape[0], stop - start), extent=extent)


def _runs(tensors: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Group tensors, given in file order, into runs that are read as one."""
    run: list[TensorSpec] = []
    end = 0
    for tensor in tensors:
        extent = tensor.extent
        if run and (extent.file_idx != run[0].extent.file_idx or extent.offset > end + MAX_GAP_BYTES):
            yield run
            run = []
        end = max(end, extent.end) if run else extent.end
        run.append(tensor)
    if run:
        yield run


def _plain_read(run: Sequence[TensorSpec], page_start: int) -> Read:
    first = run[0].extent
    end = max(t.extent.end for t in run)
    return Read(Extent(first.file_idx, first.offset, end - first.offset), page_start + first.offset % PAGE_BYTES)


def _rows_of(tensor: TensorSpec) -> RepackRows:
    assert len(tensor.shape) == 2 and tensor.shape[1] % ROWS_PER_GROUP == 0, "only whole groups of rows can be repacked"
    return RepackRows(tensor.type, tensor.type.row_bytes(tensor.shape[0]), tensor.shape[1], tensor.shape[0])
