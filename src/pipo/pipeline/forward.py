"""One pass of tokens through the model: schedule, bind, compute."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipo.base.tensor_type import TensorType
from pipo.compute.graph import Binding, Graph
from pipo.kvcache.cache import KvCache, kv_rows_class
from pipo.models.stage import ShapeClass, Stage, StageKind
from pipo.pipeline.buffers import PassBuffers
from pipo.pipeline.embedding import Embedding
from pipo.pipeline.executor import Executor
from pipo.pipeline.stage_graphs import Compute, StageGraphs
from pipo.pipeline.stats import PassStats
from pipo.pipeline.units import Unit, head_pieces
from pipo.planner.residency import Need, Step, StepKind
from pipo.planner.schedule import Schedule
from pipo.tiers.ram import Place

EMBEDDING_TABLE = "token_embd.weight"
WHOLE_PASS = -2  # in place of a stage's index: all of them at once, when every unit is in RAM for good


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to run: its stages, their units, and the vectors that always stay in RAM."""

    stages: Sequence[Stage]
    units: Sequence[Unit]
    vectors: dict[str, int]  # tensor name → address


@dataclass(frozen=True, slots=True)
class _Bound:
    """A stage's graph for the current shape, and its leaves' addresses while the unit is in `place`."""

    graph: Graph
    binding: Binding
    place: Place | None


class Forward:
    """Runs passes over one sequence's KV cache. Threads: one at a time."""

    def __init__(
        self,
        model: Model,
        compute: Compute,
        graphs: StageGraphs,
        executor: Executor,
        embedding: Embedding,
        buffers: PassBuffers,
        cache: KvCache,
        schedule: Schedule,
    ) -> None:
        self._model = model
        self._compute = compute
        self._graphs = graphs
        self._executor = executor
        self._embedding = embedding
        self._buffers = buffers
        self._cache = cache
        self._schedule = schedule
        self._unit_of_stage = {unit.stage_idx: unit for unit in model.units}
        self._tied = next((u for u in model.units if _is_plain_table(u)), None)
        self._pieces = {piece.stage_idx: piece for piece in head_pieces(model.stages)}
        self._all_needs = [self._need(i) for i in range(len(model.stages))]
        self._body_needs = [n for n in self._all_needs if not self._is_output(n.stage_idx)]
        self._all_units = [need.unit_id for need in self._all_needs if need.unit_id is not None]
        self._bound: dict[int, _Bound] = {}
        self._needs = self._all_needs
        self._has_outputs = True
        self._shape = ShapeClass(1, 1, 1, cache.shape.type_k, cache.shape.type_v)

    def take_stats(self) -> PassStats:
        """The counters since they were last taken."""
        stats, self._executor.stats = self._executor.stats, PassStats()
        return stats

    @property
    def max_tokens(self) -> int:
        return self._buffers.shape.max_tokens

    @property
    def max_outputs(self) -> int:
        return self._buffers.shape.max_outputs

    def run(self, token_ids: Sequence[int], start: int, outputs: Sequence[int] = ()) -> npt.NDArray[np.float32]:
        """Pass tokens at positions start, start + 1, …; `outputs` are indices into `token_ids`.

        Returns logits (outputs, vocabulary), valid until the next pass. Without outputs the head is neither read nor
        computed. The KV cache then holds these positions; after an error it does not.
        Raises TransferError, ComputeError, Cancelled.
        """
        num_tokens, num_outputs = len(token_ids), len(outputs)
        kv_rows = kv_rows_class(start + num_tokens)
        assert kv_rows <= self._cache.shape.num_rows, "the caller keeps to the context"
        types: tuple[TensorType, TensorType] = self._cache.shape.type_k, self._cache.shape.type_v
        self._take_shape(ShapeClass(num_tokens, kv_rows, max(num_outputs, 1), *types), bool(outputs))
        self._buffers.prepare(start, num_tokens, np.asarray(outputs, np.int32))
        self._embedding.gather(token_ids, self._buffers.hidden, self._table_address())
        self._needs = self._all_needs if outputs else self._body_needs
        if self._executor.is_settled:
            steps = [Step(StepKind.COMPUTE, WHOLE_PASS)]
        else:
            steps = self._schedule(self._needs, self._all_units, self._executor.residency.copy())
        self._executor.run(steps, self._compute_stage)
        self._executor.stats.num_tokens += num_tokens
        pieces = [(p.start, p.stop) for p in self._pieces.values()]
        return self._buffers.logits(pieces, num_outputs) if outputs else np.empty((0, 0), np.float32)

    def time_stage(self, stage_idx: int, place: Place, at_least_s: float = 0.02) -> float:
        """Seconds one stage takes for one token: the best of as many runs as `at_least_s` holds, five or more."""
        kv = self._cache.shape
        self._take_shape(ShapeClass(1, kv_rows_class(1), 1, kv.type_k, kv.type_v), has_outputs=True)
        best, total, num_runs = math.inf, 0.0, 0
        while num_runs < 5 or total < at_least_s:
            begin = time.perf_counter()
            self._compute_stage(stage_idx, place)
            seconds = time.perf_counter() - begin
            best, total, num_runs = min(best, seconds), total + seconds, num_runs + 1
        return best

    def _compute_stage(self, stage_idx: int, place: Place | None) -> None:
        bound = self._bound.get(stage_idx)
        if bound is None or bound.place is not place or bound.graph.is_freed:
            bind = self._bind_whole() if stage_idx == WHOLE_PASS else self._bind_stage(stage_idx, place)
            bound = self._bound[stage_idx] = bind
        bound.graph.bind(bound.binding)
        bound.graph.run(self._compute.backend)

    def _bind_whole(self) -> _Bound:
        """All stages of the pass as one graph, each unit where it has arrived for good."""
        stages = [self._model.stages[need.stage_idx] for need in self._needs]
        graph = self._graphs.get_whole(stages, self._shape)
        addresses: dict[str, int] = {}
        for i, need in enumerate(self._needs):
            place = self._executor.place_of(need.unit_id) if need.unit_id is not None else None
            own = self._weight_addresses(need.stage_idx, place) | self._pass_addresses(need.stage_idx, stages[i])
            addresses |= {f"{i}.{name}": address for name, address in own.items()}
        return _Bound(graph, graph.binding({name: addresses[name] for name in graph.leaf_names}), None)

    def _table_address(self) -> int | None:
        """The embedding table, where the whole model is in RAM and has the table, in plain layout, as its head."""
        if self._tied is None or not self._executor.is_settled:
            return None
        return self._executor.place_of(self._tied.unit_id).address + self._tied.layout.offsets[EMBEDDING_TABLE]

    def _take_shape(self, shape: ShapeClass, has_outputs: bool) -> None:
        """What was bound for another shape is of no use any more."""
        if shape != self._shape or has_outputs != self._has_outputs:
            self._shape, self._has_outputs = shape, has_outputs
            self._bound.clear()

    def _bind_stage(self, stage_idx: int, place: Place | None) -> _Bound:
        stage = self._model.stages[stage_idx]
        graph = self._graphs.get(stage, self._shape)
        addresses = self._weight_addresses(stage_idx, place) | self._pass_addresses(stage_idx, stage)
        return _Bound(graph, graph.binding({name: addresses[name] for name in graph.leaf_names}), place)

    def _weight_addresses(self, stage_idx: int, place: Place | None) -> dict[str, int]:
        stage = self._model.stages[stage_idx]
        addresses = {role: self._model.vectors[spec.name] for role, spec in stage.vectors.items()}
        if place is not None:
            offsets = self._unit_of_stage[stage_idx].layout.offsets
            addresses |= {role: place.address + offsets[spec.name] for role, spec in stage.matrices.items()}
        return addresses

    def _pass_addresses(self, stage_idx: int, stage: Stage) -> dict[str, int]:
        """Where the pass's own arrays lie, with the rows of the cache and of the logits that belong to the stage."""
        addresses = dict(self._buffers.addresses)
        if stage.kind is StageKind.ATTENTION:
            addresses["k_cache"] = self._cache.address_k(stage.block_idx)
            addresses["v_cache"] = self._cache.address_v(stage.block_idx)
        elif stage.kind is StageKind.HEAD:
            addresses["logits"] = self._buffers.logits_address(self._pieces[stage_idx].start, self._shape.num_outputs)
        return addresses

    def _need(self, stage_idx: int) -> Need:
        unit = self._unit_of_stage.get(stage_idx)
        return Need(stage_idx, unit.unit_id if unit else None)

    def _is_output(self, stage_idx: int) -> bool:
        return self._model.stages[stage_idx].kind in (StageKind.FINAL_NORM, StageKind.HEAD)


def _is_plain_table(unit: Unit) -> bool:
    return any(read.rows is None for read in unit.layout.reads) and EMBEDDING_TABLE in unit.layout.offsets
