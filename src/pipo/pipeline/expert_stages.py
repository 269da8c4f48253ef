"""Stages of experts: who is chosen, who is guessed for the next block, and their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_uint64
from itertools import groupby
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from pipo.compute.graph import Graph
from pipo.models.stage import ExpertBank, ExpertShape, Stage, Sum
from pipo.pipeline.buffers import FEW_TOKENS, PassBuffers
from pipo.pipeline.expert_cache import ExpertCache
from pipo.pipeline.expert_schedule import ExpertSchedule, Visit
from pipo.pipeline.expert_stats import ExpertStats
from pipo.pipeline.expert_units import ExpertUnits
from pipo.pipeline.routing import FloatArray, IntArray, Routing, likeliest, likeliest_one, route, route_one
from pipo.pipeline.row_lists import RowLists
from pipo.pipeline.stage_graphs import MAX_GROUP, StageGraphs
from pipo.pipeline.units import Unit
from pipo.planner.residency import Step, UnitId
from pipo.tiers.ram import Place

NoteRouting = Callable[[int, Routing], None]  # the block, counted among those with experts


class Whereabouts:
    """Addresses of a unit's matrices, in the order of roles, while it is in `place`, and of its biases."""

    __slots__ = ("addresses", "unit_id")

    def __init__(self, place: Place, unit: Unit, biases: Sequence[int]) -> None:
        self.unit_id = unit.unit_id
        matrices = (place.address + unit.layout.offsets[name] for name in unit.tensor_bytes)
        self.addresses = (*matrices, *biases)


class BoundGraph:
    """Where the addresses of a graph's experts are written. Leaves that never change are bound for good."""

    def __init__(self, graph: Graph, bank: ExpertBank, num_slots: int, buffers: PassBuffers) -> None:
        fixed = {
            name: buffers.addresses[name] for name in ("hidden", "ffn_x", "expert_out") if name in graph.leaf_names
        }
        graph.bind(graph.binding(fixed))
        roles = [*bank.matrices, *bank.biases]
        self._weights = [[_field(graph, f"{role}.{slot}") for role in roles] for slot in range(num_slots)]
        lists = [name for name in ("rows", "out", "weights") if f"{name}.0" in graph.leaf_names]
        self._lists = [[_field(graph, f"{name}.{slot}") for name in lists] for slot in range(num_slots)]
        self._first_list = 3 - len(lists)

    def point(self, slot: int, weights: Sequence[int], lists: Sequence[int]) -> None:
        """The expert in this place of the graph, and its row lists: tokens, rows for results, their weights."""
        for field, address in zip(self._weights[slot], weights, strict=True):
            field.value = address
        for field, address in zip(self._lists[slot], lists[self._first_list :], strict=True):
            field.value = address


def _field(graph: Graph, name: str) -> c_uint64:
    """Of a leaf without views."""
    ((field, _),) = graph.pointers(name)
    return field


class ExpertStages:
    """Computes the experts of one pass after another, on the CPU. Threads: one.

    At most `num_ahead` reads are under way for experts that are not computed yet. `vectors` are addresses by name.
    `on_routing` hears of every choice.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        units: ExpertUnits,
        cache: ExpertCache,
        graphs: StageGraphs,
        buffers: PassBuffers,
        vectors: Mapping[str, int],
        num_ahead: int,
    ) -> None:
        self.on_routing: NoteRouting = lambda block, routing: None
        self._stages = stages
        self._units = units
        self.cache = cache
        self._graphs = graphs
        self._buffers = buffers
        self._vectors = vectors
        self._schedule = ExpertSchedule(cache, num_ahead, ExpertStats.of(units.ids.num_blocks))
        self._lists = RowLists(buffers)
        self._used: list[tuple[int, IntArray | list[list[int]]]] = []  # of this pass: a block, and its routing
        self._bound: WeakKeyDictionary[Graph, BoundGraph] = WeakKeyDictionary()
        self._where: dict[int, Whereabouts] = {}  # by the address of the slot
        self._few = min(buffers.shape.max_tokens, FEW_TOKENS)
        self._num_tokens = 0
        self._bring_inputs: Callable[[], None] = lambda: None

    def take_stats(self) -> ExpertStats:
        """Since they were last taken."""
        stats, self._schedule.stats = self._schedule.stats, ExpertStats.of(self._units.ids.num_blocks)
        return stats

    def begin_pass(self, num_tokens: int, bring_inputs: Callable[[], None]) -> None:
        """What the last pass was cut short in is forgotten. `bring_inputs` puts in RAM what a block's router and
        attention gave, if it is not there.
        """
        self._num_tokens = num_tokens
        self._bring_inputs = bring_inputs
        self._used.clear()
        self._schedule.forget()

    def end_pass(self) -> None:
        ids = self._units.ids
        used = np.zeros(ids.num_blocks * ids.num_experts, np.int64)
        for block, experts in self._used:
            np.add.at(used, np.asarray(experts).ravel() + block * ids.num_experts, 1)
        self.cache.note(used.reshape(ids.num_blocks, ids.num_experts), self._num_tokens)

    def unit(self, unit_id: UnitId) -> Unit:
        return self._units.unit(unit_id)

    def steps(self, stage_idx: int, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        """Raises ComputeError where the router's scores are not finite."""
        self._bring_inputs()
        block, bank = self._units.block_of_stage[stage_idx], self._bank(stage_idx)
        routing = self._route(stage_idx, bank)
        self._used.append((block, routing.experts))
        self.on_routing(block, routing)
        in_order = self._num_tokens > self._few
        if self._num_tokens == 1:
            self._lists.lay_one(routing)
        else:
            unused_row = self._num_tokens if in_order else self._few * bank.num_experts_per_tok
            self._lists.lay(routing, unused_row, in_order=in_order)
        needed, guessed = self._units.ids.units(block, self._lists.lists), self._guessed(block, bank)
        visit = Visit(stage_idx, block, needed, guessed, self._groups, in_order, at_once=self._num_tokens == 1)
        yield from self._schedule.steps(visit, is_here)

    def _route(self, stage_idx: int, bank: ExpertBank) -> Routing:
        what, scores = f"the router of block {self._stages[stage_idx].block_idx}", self._scores("router")
        if self._num_tokens == 1:
            return route_one(scores[0].tolist(), bank.num_experts_per_tok, renormalise=bank.renormalise, what=what)
        return route(scores, bank.num_experts_per_tok, renormalise=bank.renormalise, what=what)

    def _guessed(self, block: int, bank: ExpertBank) -> Sequence[UnitId]:
        """Experts of the next block that its router would choose now."""
        if block + 1 == self._units.ids.num_blocks:
            return ()
        what, scores, num = "the router of the next block", self._scores("next_router"), bank.num_experts_per_tok
        if self._num_tokens == 1:
            return self._units.ids.units(block + 1, likeliest_one(scores[0].tolist(), num, what))
        return self._units.ids.units(block + 1, np.unique(likeliest(scores, num, what)).tolist())

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
        bank = self._bank(step.stage_idx)
        graph = self._graphs.get_experts(self._stages[step.stage_idx], self._shape(step, bank))
        bound = self._bound.get(graph)
        if bound is None:
            bound = self._bound[graph] = BoundGraph(graph, bank, len(experts), self._buffers)
        split = self._units.ids.split
        for slot, (unit, place) in enumerate(experts):
            where = self._where.get(place.address)
            if where is None or where.unit_id != unit.unit_id:
                biases = self._biases(bank, split(unit.unit_id)[1])
                where = self._where[place.address] = Whereabouts(place, unit, biases)
            bound.point(slot, where.addresses, self._lists.addresses(split(unit.unit_id)[1]))
        self._graphs.run(graph)

    def _biases(self, bank: ExpertBank, expert: int) -> list[int]:
        return [self._vectors[spec.name] + expert * spec.type.row_bytes(spec.shape[0]) for spec in bank.biases.values()]

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
