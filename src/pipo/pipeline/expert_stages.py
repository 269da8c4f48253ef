"""Stages of experts: who is chosen, who is guessed for the next block, and their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from pipo.models.stage import ExpertBank, ExpertShape, Stage, Sum
from pipo.pipeline.buffers import FEW_TOKENS, PassBuffers
from pipo.pipeline.expert_cache import ExpertCache
from pipo.pipeline.expert_schedule import ExpertSchedule, Visit
from pipo.pipeline.expert_stats import ExpertStats
from pipo.pipeline.expert_units import ExpertUnits
from pipo.pipeline.routing import FloatArray, Routing, likeliest, route
from pipo.pipeline.row_lists import RowLists
from pipo.pipeline.stage_graphs import MAX_GROUP, StageGraphs
from pipo.pipeline.units import Unit
from pipo.planner.residency import Step, UnitId
from pipo.tiers.ram import Place

NoteRouting = Callable[[int, Routing], None]  # the block, counted among those with experts


class ExpertStages:
    """Computes the experts of one pass after another, on the CPU. Threads: one.

    At most `num_ahead` reads are under way for experts that are not computed yet. `on_routing` hears of every choice.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        units: ExpertUnits,
        cache: ExpertCache,
        graphs: StageGraphs,
        buffers: PassBuffers,
        num_ahead: int,
    ) -> None:
        self.on_routing: NoteRouting = lambda block, routing: None
        self._stages = stages
        self._units = units
        self.cache = cache
        self._graphs = graphs
        self._buffers = buffers
        self._schedule = ExpertSchedule(cache, num_ahead, ExpertStats.of(units.ids.num_blocks))
        self._lists = RowLists(buffers)
        self._few = min(buffers.shape.max_tokens, FEW_TOKENS)
        self._num_tokens = 0

    def take_stats(self) -> ExpertStats:
        """Since they were last taken."""
        stats, self._schedule.stats = self._schedule.stats, ExpertStats.of(self._units.ids.num_blocks)
        return stats

    def begin_pass(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._schedule.forget()

    def unit(self, unit_id: UnitId) -> Unit:
        return self._units.unit(unit_id)

    def steps(self, stage_idx: int, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        """Raises ComputeError where the router's scores are not finite."""
        block, bank = self._units.block_of_stage[stage_idx], self._bank(stage_idx)
        what = f"the router of block {self._stages[stage_idx].block_idx}"
        routing = route(self._scores("router"), bank.num_experts_per_tok, renormalise=bank.renormalise, what=what)
        self.on_routing(block, routing)
        in_order = self._num_tokens > self._few
        unused_row = self._num_tokens if in_order else self._few * bank.num_experts_per_tok
        self._lists.lay(routing, unused_row, in_order=in_order)
        ids = self._units.ids
        needed, guessed = ids.units(block, self._lists.lists), self._guessed(block, bank)
        visit = Visit(stage_idx, block, needed, guessed, self._groups, in_order, at_once=self._num_tokens == 1)
        yield from self._schedule.steps(visit, is_here)
        counts = np.bincount(routing.experts.ravel(), minlength=bank.num_experts)
        self.cache.note(block, counts, self._num_tokens)

    def _guessed(self, block: int, bank: ExpertBank) -> Sequence[UnitId]:
        """Experts of the next block that its router would choose now."""
        if block + 1 == self._units.ids.num_blocks:
            return ()
        scores = self._scores("next_router")
        experts = np.unique(likeliest(scores, bank.num_experts_per_tok, f"the router of block {block + 1}"))
        return self._units.ids.units(block + 1, experts.tolist())

    def _groups(self, units: Sequence[UnitId]) -> Iterator[tuple[UnitId, ...]]:
        """Experts with as many rows are computed together."""
        if self._num_tokens == 1:
            yield from (tuple(units),) if units else ()
            return
        lists, split = self._lists.lists, self._units.ids.split
        by_rows = sorted(units, key=lambda unit: lists[split(unit)[1]].num_rows)
        for _, alike in groupby(by_rows, key=lambda unit: lists[split(unit)[1]].num_rows):
            together = list(alike)
            for first in range(0, len(together), MAX_GROUP):
                yield tuple(together[first : first + MAX_GROUP])

    def compute(self, step: Step, experts: Sequence[tuple[Unit, Place]]) -> None:
        stage = self._stages[step.stage_idx]
        graph = self._graphs.get_experts(stage, self._shape(step, self._bank(step.stage_idx)))
        addresses = self._buffers.addresses
        leaves = {name: addresses[name] for name in ("hidden", "ffn_x", "expert_out")}
        for slot, (unit, place) in enumerate(experts):
            for role, (name, offset) in zip(self._bank(step.stage_idx).matrices, _offsets(unit), strict=True):
                leaves[f"{role}.{slot}"] = place.address + offset
            leaves |= self._lists.leaves(self._units.ids.split(unit.unit_id)[1], slot)
        graph.bind(graph.binding({name: leaves[name] for name in graph.leaf_names}))
        self._graphs.run(graph)

    def _shape(self, step: Step, bank: ExpertBank) -> ExpertShape:
        if not step.units:
            return ExpertShape(Sum.NOW, self._num_tokens)
        num = len(step.units)
        if self._num_tokens == 1 and num == bank.num_experts_per_tok:
            return ExpertShape(Sum.AT_ONCE, 1, num)
        num_rows = self._lists.lists[self._units.ids.split(step.units[0])[1]].num_rows
        if self._num_tokens <= self._few:
            return ExpertShape(Sum.LATER, self._few + 1, num, num_rows)
        return ExpertShape(Sum.IN_ORDER, self._buffers.shape.max_tokens + 1, num, num_rows)

    def _bank(self, stage_idx: int) -> ExpertBank:
        bank = self._stages[stage_idx].bank
        assert bank is not None
        return bank

    def _scores(self, name: str) -> FloatArray:
        """(tokens, experts)"""
        num_experts = self._units.ids.num_experts
        scores: npt.NDArray[np.float32] = self._buffers.arrays[name].view(np.float32)
        return scores[: self._num_tokens * num_experts].reshape(-1, num_experts)


def _offsets(unit: Unit) -> Iterator[tuple[str, int]]:
    return ((name, unit.layout.offsets[name]) for name in unit.tensor_bytes)
