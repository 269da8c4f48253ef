"""From stages to units: what moves as one, how it lies in its place, which layout each weight has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pipo.base.manifest import TensorSpec
from pipo.base.tensor_type import ROWS_PER_GROUP
from pipo.base.units import PAGE_BYTES
from pipo.models.stage import Stage, StageKind
from pipo.planner.placement import UnitRole, UnitSize
from pipo.planner.residency import UnitId
from pipo.store.index import UnitLayout, cut_rows, layout_unit

ROLES = {StageKind.ATTENTION: UnitRole.ATTENTION, StageKind.MLP: UnitRole.MLP, StageKind.HEAD: UnitRole.HEAD}

ROWS_PER_PIECE = 8 * ROWS_PER_GROUP  # or a multiple: a device wants each piece's logits on 256 bytes
PIECE_SLACK = 2 * PAGE_BYTES  # a plain piece begins and ends inside a page


@dataclass(frozen=True, slots=True)
class Unit:
    """The matrices of one stage. `stage_idx` is the stage that consumes it."""

    unit_id: UnitId
    stage_idx: int
    label: str
    layout: UnitLayout
    tensor_bytes: Mapping[str, int]  # by name, without alignment

    @property
    def num_bytes(self) -> int:
        return sum(self.tensor_bytes.values())


@dataclass(frozen=True, slots=True)
class HeadPiece:
    """Rows of the vocabulary that one HEAD stage computes."""

    stage_idx: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WeightLayouts:
    """Which tensors are kept in the layout of ggml's repacked kernels. A piece has the layout of its whole."""

    repacked: frozenset[str]

    def is_repacked(self, name: str) -> bool:
        """Of a tensor, or of a part of one: rows of the head, or an expert."""
        return name.split("[")[0] in self.repacked

    def repacks(self, spec: TensorSpec) -> bool:
        """While it is read: the file has it in the plain layout."""
        return self.is_repacked(spec.name) and not spec.is_repacked

    def lay_out(self, tensors: Collection[TensorSpec]) -> UnitLayout:
        return layout_unit(list(tensors), repacked=[spec.name for spec in tensors if self.repacks(spec)])


def unit_sizes(stages: Sequence[Stage], layouts: WeightLayouts) -> list[UnitSize]:
    """One size per stage that has matrices, in stage order. The head may be cut to the size of an MLP."""
    mlps = (stage.matrices.values() for stage in stages if stage.kind is StageKind.MLP)
    largest_mlp = max((layouts.lay_out(each).num_bytes for each in mlps), default=0)
    return [_size(stage, layouts, largest_mlp) for stage in stages if stage.matrices]


def _size(stage: Stage, layouts: WeightLayouts, largest_mlp: int) -> UnitSize:
    place_bytes = layouts.lay_out(stage.matrices.values()).num_bytes
    piece = None
    if stage.kind is StageKind.HEAD and place_bytes > largest_mlp:
        piece = max(layouts.lay_out(p.matrices.values()).num_bytes for p in _pieces(stage, largest_mlp))
    return UnitSize(ROLES[stage.kind], stage.block_idx, place_bytes, weight_bytes(stage), piece)


def cut_head(stages: Sequence[Stage], max_bytes: int) -> list[Stage]:
    """Replace the HEAD stage by stages over whole groups of its rows, each at most `max_bytes` where possible."""
    return [p for stage in stages for p in (_pieces(stage, max_bytes) if stage.kind is StageKind.HEAD else [stage])]


def head_pieces(stages: Sequence[Stage]) -> list[HeadPiece]:
    pieces, start = [], 0
    for i, stage in enumerate(stages):
        if stage.kind is StageKind.HEAD:
            stop = start + stage.matrices["output.weight"].shape[1]
            pieces.append(HeadPiece(i, start, stop))
            start = stop
    return pieces


def make_units(stages: Sequence[Stage], layouts: WeightLayouts) -> list[Unit]:
    units: list[Unit] = []
    for i, stage in enumerate(stages):
        if stage.matrices:
            tensor_bytes = {spec.name: spec.num_bytes for spec in stage.matrices.values()}
            layout = layouts.lay_out(stage.matrices.values())
            units.append(Unit(UnitId(len(units)), i, _label(stage), layout, tensor_bytes))
    return units


def weight_bytes(stage: Stage) -> int:
    return sum(spec.num_bytes for spec in stage.matrices.values())


def _pieces(stage: Stage, max_bytes: int) -> list[Stage]:
    spec = stage.matrices["output.weight"]
    piece_bytes = spec.type.row_bytes(spec.shape[0]) * ROWS_PER_PIECE
    pieces = cut_rows(spec, max(max_bytes - PIECE_SLACK, piece_bytes), ROWS_PER_PIECE)
    return [replace(stage, matrices={"output.weight": piece}) for piece in pieces]


def _label(stage: Stage) -> str:
    return f"{stage.kind.value} {stage.block_idx}" if stage.block_idx >= 0 else stage.kind.value
