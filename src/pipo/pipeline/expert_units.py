"""The experts of a model as units, each of which moves by itself. They are made when asked for: there are thousands."""

from __future__ import annotations

from collections.abc import Sequence

from pipo.base.units import PAGE_BYTES, round_up
from pipo.models.stage import ExpertBank, Stage
from pipo.pipeline.expert_cache import ExpertIds
from pipo.pipeline.units import Unit, WeightLayouts
from pipo.planner.residency import UnitId


class ExpertUnits:
    """`ids.first` is the first id no other unit has."""

    def __init__(self, stages: Sequence[Stage], layouts: WeightLayouts, first: int) -> None:
        self._layouts = layouts
        self._banks = [(i, stage, stage.bank) for i, stage in enumerate(stages) if stage.bank is not None]
        self.ids = ExpertIds(first, len(self._banks), self._banks[0][2].num_experts)
        self.block_of_stage = {stage_idx: block for block, (stage_idx, _, _) in enumerate(self._banks)}

    def unit(self, unit_id: UnitId) -> Unit:
        block, expert = self.ids.split(unit_id)
        stage_idx, stage, bank = self._banks[block]
        specs = bank.expert(expert).values()
        sizes = {spec.name: spec.num_bytes for spec in specs}
        label = f"expert {stage.block_idx}.{expert}"
        return Unit(unit_id, stage_idx, label, self._layouts.lay_out(specs), sizes)


def expert_slot_bytes(bank: ExpertBank, layouts: WeightLayouts) -> int:
    """That hold any expert of the bank: where its matrices begin within a page differs."""
    num_bytes = PAGE_BYTES
    for spec in bank.matrices.values():
        size = round_up(spec.num_bytes // bank.num_experts, PAGE_BYTES)
        num_bytes += size if layouts.repacks(spec) else size + PAGE_BYTES
    return num_bytes


def expert_bytes(bank: ExpertBank) -> int:
    """Read for one expert."""
    return sum(spec.num_bytes // bank.num_experts for spec in bank.matrices.values())
