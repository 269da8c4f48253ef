"""Rows of a tensor, read past the page cache and brought to another type by libggml's own routines.

Cost, in millions of weights a second and thread: 250 to 550 to types with blocks of 32, 20 to 40 to K-quants and IQ4.
libggml holds no lock of Python meanwhile, so as many threads as cores pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.tensor_type import ROWS_PER_GROUP, TensorType
from pipo.base.units import PAGE_BYTES, round_down, round_up
from pipo.compute.dequantise import Dequantiser
from pipo.compute.ggml import Library
from pipo.compute.repack import RepackBuffer
from pipo.packing.types import TensorPlan
from pipo.tiers.ram import Place
from pipo.transfer.files import UncachedFile

Floats = npt.NDArray[np.float32]
# Scales of blocks are float16, and the first that is infinite makes a block of NaN. No weight of a model is so large.
MOST = 65504.0
_WIDE_TYPES = (TensorType.F32, TensorType.BF16)
_ALIGNMENT = 32  # of what libggml reads


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some rows of a tensor: what one thread takes at a time."""

    tensor: TensorPlan
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a group is read to, decoded and quantised. Belongs to one group at a time."""

    raw: Place
    floats: Place
    out: Place


@dataclass(frozen=True, slots=True)
class WorkspaceSizes:
    raw: int
    floats: int
    out: int

    @property
    def num_bytes(self) -> int:
        return self.raw + self.floats + self.out


def group_rows(tensor: TensorPlan, group_bytes: int) -> int:
    """Rows of a group of at most so many bytes of its widest form; one at least."""
    widest = tensor.source_row_bytes if tensor.is_copied or tensor.is_repacked else tensor.row_elems * 4
    num_rows = min(max(group_bytes // widest, 1), tensor.run_rows)
    if tensor.is_repacked:
        return max(round_down(num_rows, ROWS_PER_GROUP), ROWS_PER_GROUP)
    return max(round_down(num_rows, 2), 2) if tensor.head_rows else num_rows  # pairs stay together


def groups_of(tensor: TensorPlan, group_bytes: int) -> Iterator[RowGroup]:
    step = group_rows(tensor, group_bytes)
    for run in range(0, tensor.num_rows, tensor.run_rows):
        end = run + tensor.run_rows
        for start in range(run, end, step):
            yield RowGroup(tensor, start, min(step, end - start))


def workspace_sizes(tensors: Sequence[TensorPlan], group_bytes: int) -> WorkspaceSizes:
    """What the largest group of each kind needs, in whole pages."""
    each = [_sizes(tensor, group_rows(tensor, group_bytes)) for tensor in tensors]
    raw, floats, out = (max(sizes, default=0) for sizes in zip(*each, strict=True)) if each else (0, 0, 0)
    return WorkspaceSizes(*(max(round_up(size, PAGE_BYTES), PAGE_BYTES) for size in (raw, floats, out)))


class Converter:
    """Reads groups of rows and converts them. Threads: any, each with a workspace of its own."""

    def __init__(
        self,
        lib: Library,
        files: Sequence[UncachedFile],
        tensors: Sequence[TensorPlan],
        repack: RepackBuffer | None = None,
    ) -> None:
        """`repack` is there where a tensor is to be repacked."""
        self._lib = lib
        self._files = files
        self._repack = repack
        types = {tensor.stored_type for tensor in tensors if not tensor.is_copied}
        self._dequantisers: Mapping[TensorType, Dequantiser] = {type_: Dequantiser(lib, type_) for type_ in types}

    def convert(self, group: RowGroup, workspace: Workspace) -> memoryview:
        """The group as the output has it, somewhere in the workspace.

        Raises TransferError; MalformedFile and UnsupportedModel for values that no type or not this one can hold.
        """
        tensor = group.tensor
        if tensor.is_copied:
            return read_rows(self._files, group, workspace.raw)[0]
        if tensor.is_computed:
            return _computed(group, workspace.floats)
        if tensor.is_repacked:
            return self._repacked(group, workspace)
        address, values = self.decode(group, workspace)
        check_values(group, self._files[tensor.source.extent.file_idx].path, values)
        if tensor.type is TensorType.F32:
            return values.data.cast("B")
        written = self._lib.quantize_chunk(
            int(tensor.type), address, workspace.out.address, 0, group.num_rows, tensor.row_elems, None
        )
        assert written == group.num_rows * tensor.row_bytes
        return workspace.out.view[:written]

    def _repacked(self, group: RowGroup, workspace: Workspace) -> memoryview:
        assert self._repack is not None
        raw, skip = read_rows(self._files, group, workspace.raw)
        source, target = workspace.raw.address + skip, workspace.out.address
        self._repack.repack_rows(group.tensor.type, group.tensor.row_elems, group.num_rows, source, target)
        return workspace.out.view[: len(raw)]

    def decode(self, group: RowGroup, workspace: Workspace) -> tuple[int, Floats]:
        """The group as float32: its address, and the same as an array. Raises TransferError."""
        raw, skip = read_rows(self._files, group, workspace.raw)
        if skip % _ALIGNMENT:  # in safetensors a tensor may begin at any byte
            raw, skip = _moved_to(workspace.raw, raw), 0
        address, place = workspace.raw.address + skip, raw
        if group.tensor.stored_type is not TensorType.F32:
            num_elems = group.num_rows * group.tensor.row_elems
            self._dequantisers[group.tensor.stored_type].convert(address, workspace.floats.address, num_elems)
            address, place = workspace.floats.address, workspace.floats.view[: 4 * num_elems]
        values = np.frombuffer(place, np.float32)
        if group.tensor.added:
            values += np.float32(group.tensor.added)
        return address, values


def read_rows(files: Sequence[UncachedFile], group: RowGroup, place: Place) -> tuple[memoryview, int]:
    """The rows' bytes and where in the place they begin. Raises TransferError."""
    if group.tensor.head_rows:
        return _read_pairs(files, group, place)
    skip = _read_run(files, group.tensor, group.start, group.num_rows, place.view)
    return place.view[skip : skip + group.num_rows * group.tensor.source_row_bytes], skip


def _read_pairs(files: Sequence[UncachedFile], group: RowGroup, place: Place) -> tuple[memoryview, int]:
    """Rows of one head: those of its first half and of its second by turns. Rows move whole."""
    tensor, num_pairs = group.tensor, group.num_rows // 2
    head = round_down(group.start, tensor.head_rows)
    first = head + (group.start - head) // 2
    half_bytes = _half_bytes(tensor, group.num_rows)
    target = place.view[2 * half_bytes : 2 * half_bytes + group.num_rows * tensor.source_row_bytes]
    pairs = np.frombuffer(target, np.uint8).reshape(num_pairs, 2, tensor.source_row_bytes)
    for half in range(2):
        view = place.view[half * half_bytes : (half + 1) * half_bytes]
        skip = _read_run(files, tensor, first + half * (tensor.head_rows // 2), num_pairs, view)
        rows = np.frombuffer(view[skip : skip + num_pairs * tensor.source_row_bytes], np.uint8)
        pairs[:, half] = rows.reshape(num_pairs, -1)
    return target, 2 * half_bytes


def _half_bytes(tensor: TensorPlan, num_rows: int) -> int:
    """Room for half of so many rows, wherever they begin."""
    return round_up(num_rows // 2 * tensor.source_row_bytes, PAGE_BYTES) + PAGE_BYTES


def _read_run(files: Sequence[UncachedFile], tensor: TensorPlan, start: int, num_rows: int, view: memoryview) -> int:
    """Rows that lie side by side, and where in the view they begin. Raises TransferError."""
    extent, row_bytes = tensor.source.extent, tensor.source_row_bytes
    if tensor.source.slices:
        extent, start = tensor.source.slices[start // tensor.run_rows], start % tensor.run_rows
    offset, num_bytes = extent.offset + start * row_bytes, num_rows * row_bytes
    begin = round_down(offset, PAGE_BYTES)
    skip = offset - begin
    file = files[extent.file_idx]
    file.check_unchanged()
    file.read(view[: round_up(skip + num_bytes, PAGE_BYTES)], begin, skip + num_bytes)
    return skip


def _moved_to(place: Place, raw: memoryview) -> memoryview:
    """The same bytes at the beginning of the place in which they lie."""
    place.view[: len(raw)] = raw
    return place.view[: len(raw)]


def _computed(group: RowGroup, place: Place) -> memoryview:
    start = group.start * group.tensor.row_elems
    num_elems = group.num_rows * group.tensor.row_elems
    raw = np.asarray(group.tensor.source.values[start : start + num_elems], np.float32).tobytes()
    place.view[: len(raw)] = raw
    return place.view[: len(raw)]


def check_values(group: RowGroup, path: Path, values: Floats) -> None:
    """Raises MalformedFile for a value that is not finite, UnsupportedModel for one that the type cannot hold."""
    what = f"{path}: tensor {group.tensor.name!r}"
    row = row_not_finite(group, values)
    if row is not None:
        raise MalformedFile(
            f"{what} has a value in row {row} that is not a finite number", hint="the file is damaged: fetch it again"
        )
    most = max(-float(values.min()), float(values.max()))
    if group.tensor.type not in _WIDE_TYPES and most > MOST:
        row = _row_of(group, int(np.abs(values).argmax()))
        raise UnsupportedModel(
            f"{what} has {most:g} in row {row}, {group.tensor.type.name} holds at most {MOST:g}",
            hint="--type bf16 holds it",
        )


def row_not_finite(group: RowGroup, values: Floats) -> int | None:
    """The first row of the tensor with a NaN or an infinity; no memory unless there is one."""
    with np.errstate(invalid="ignore"):
        if isfinite(values.min()) and isfinite(values.max()):
            return None
    return _row_of(group, int((~np.isfinite(values)).argmax()))


def _row_of(group: RowGroup, elem_idx: int) -> int:
    return group.start + elem_idx // group.tensor.row_elems


def _sizes(tensor: TensorPlan, num_rows: int) -> tuple[int, int, int]:
    raw = num_rows * tensor.source_row_bytes + 2 * PAGE_BYTES
    if tensor.head_rows:
        raw += 2 * _half_bytes(tensor, num_rows)
    if tensor.is_copied:
        return raw, 0, 0
    if tensor.is_repacked:
        return raw, 0, num_rows * tensor.row_bytes
    is_read_as_it_is = tensor.stored_type is TensorType.F32 and not tensor.is_computed
    floats = 0 if is_read_as_it_is else num_rows * tensor.row_elems * 4
    return raw, floats, 0 if tensor.type is TensorType.F32 else num_rows * tensor.row_bytes
