"""Where stages compute: the CPU, and a device beside it, each with graphs and memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipo.compute.device import DevicePlace
from pipo.compute.graph import Binding, Graph
from pipo.kvcache.cache import KvCache
from pipo.models.stage import Corrections, ShapeClass, Stage, StageKind
from pipo.pipeline.adapters import NO_ADAPTERS, ActiveAdapters
from pipo.pipeline.buffers import STAGE_ARRAYS, PassBuffers
from pipo.pipeline.spans import PassRows
from pipo.pipeline.stage_graphs import StageGraphs
from pipo.pipeline.units import HeadPiece, Unit, head_pieces
from pipo.tiers.ram import Place

A = TypeVar("A", int, DevicePlace)  # how a graph's leaf is told where it lies


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to run: its stages and their units."""

    stages: Sequence[Stage]
    units: Sequence[Unit]

    @property
    def unit_of_stage(self) -> dict[int, Unit]:
        return {unit.stage_idx: unit for unit in self.units}


class Memory(Protocol[A]):
    """Where the leaves of a side's graphs lie."""

    def vector(self, name: str) -> A: ...

    def matrix(self, unit: Unit, name: str, place: Place | DevicePlace) -> A: ...

    @property
    def stage_arrays(self) -> Collection[str]:
        """Names of the arrays of a pass that stages may want: hidden, mask, …"""

    def array(self, name: str) -> A: ...

    def adapter(self, key: str) -> A:
        """Of a tensor of an adapter, or its scales."""

    def logits(self, first_row: int, num_outputs: int) -> A: ...

    def keys_and_values(self, block_idx: int, sequence: int) -> tuple[A, A]:
        """Of a sequence, and of those after it."""

    def bind(self, graph: Graph, leaves: Mapping[str, A]) -> Binding: ...


class CpuMemory:
    """In RAM, by address."""

    def __init__(
        self, vectors: Mapping[str, int], buffers: PassBuffers, cache: KvCache, adapters: Mapping[str, int]
    ) -> None:
        self._vectors = vectors
        self._buffers = buffers
        self._cache = cache
        self._adapters = adapters

    def vector(self, name: str) -> int:
        return self._vectors[name]

    def matrix(self, unit: Unit, name: str, place: Place | DevicePlace) -> int:
        assert isinstance(place, Place)
        return place.address + unit.layout.offsets[name]

    @property
    def stage_arrays(self) -> Collection[str]:
        return STAGE_ARRAYS & self._buffers.addresses.keys() - {"logits"}

    def array(self, name: str) -> int:
        return self._buffers.addresses[name]

    def adapter(self, key: str) -> int:
        return self._adapters[key]

    def logits(self, first_row: int, num_outputs: int) -> int:
        return self.array("logits") + self._buffers.logits_offset(first_row, num_outputs)

    def keys_and_values(self, block_idx: int, sequence: int) -> tuple[int, int]:
        return self._cache.address_k(block_idx, sequence), self._cache.address_v(block_idx, sequence)

    def bind(self, graph: Graph, leaves: Mapping[str, int]) -> Binding:
        return graph.binding(leaves)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A stage's graph for the current shape, and its leaves' addresses while the unit is in `place`."""

    graph: Graph
    binding: Binding
    place: Place | DevicePlace | None


class Side(Generic[A]):
    """Computes stages of the current shape on one backend. Threads: one at a time."""

    def __init__(self, model: Model, graphs: StageGraphs, memory: Memory[A]) -> None:
        self._model = model
        self._graphs = graphs
        self._memory: Memory[A] = memory
        self._unit_of_stage = model.unit_of_stage
        self._pieces: dict[int, HeadPiece] = {piece.stage_idx: piece for piece in head_pieces(model.stages)}
        self._bound: dict[int, _Bound] = {}
        self._whole: _Bound | None = None
        self._shape: ShapeClass | None = None
        self._arrays = memory.stage_arrays
        self._stage_idxs: Sequence[int] = ()
        self._firsts: tuple[int, ...] = ()
        self._adapters = NO_ADAPTERS

    def take_shape(
        self,
        shape: ShapeClass,
        stage_idxs: Sequence[int],
        firsts: tuple[int, ...],
        adapters: ActiveAdapters = NO_ADAPTERS,
    ) -> None:
        """Of the passes to come, the stages that each computes, the sequence that each group begins with, and the
        adapters that any of them has. What was bound for others is of no use any more.
        """
        is_other = stage_idxs is not self._stage_idxs or adapters is not self._adapters
        if shape != self._shape or is_other or firsts != self._firsts:
            self._shape, self._stage_idxs, self._firsts = shape, stage_idxs, firsts
            self._adapters = adapters
            self.forget_places()

    def forget_places(self) -> None:
        """Units have moved, or the shape is another."""
        self._bound.clear()
        self._whole = None

    def compute(self, stage_idx: int, place: Place | DevicePlace | None) -> None:
        bound = self._bound.get(stage_idx)
        if bound is None or bound.place is not place or bound.graph.is_freed:
            bound = self._bound[stage_idx] = self._bind(stage_idx, place)
        self._run(bound)

    def compute_all(self, place_of: Callable[[int], Place | DevicePlace | None]) -> None:
        """All stages of the pass as one graph, each unit where it has arrived for good."""
        if self._whole is None or self._whole.graph.is_freed:
            self._whole = self._bind_all(place_of)
        self._run(self._whole)

    def _run(self, bound: _Bound) -> None:
        bound.graph.bind(bound.binding)
        self._graphs.run(bound.graph)

    def _bind(self, stage_idx: int, place: Place | DevicePlace | None) -> _Bound:
        assert self._shape is not None
        stage = self._model.stages[stage_idx]
        graph = self._graphs.get(stage, self._shape, self._adapters.corrections(stage))
        leaves = self._leaves(stage_idx, place)
        return _Bound(graph, self._memory.bind(graph, {name: leaves[name] for name in graph.leaf_names}), place)

    def _bind_all(self, place_of: Callable[[int], Place | DevicePlace | None]) -> _Bound:
        assert self._shape is not None
        stages = [self._model.stages[i] for i in self._stage_idxs]
        graph = self._graphs.get_whole(stages, self._shape, self._corrections(stages))
        leaves: dict[str, A] = {}
        for i, stage_idx in enumerate(self._stage_idxs):
            own = self._leaves(stage_idx, place_of(stage_idx))
            leaves |= {f"{i}.{name}": where for name, where in own.items()}
        return _Bound(graph, self._memory.bind(graph, {name: leaves[name] for name in graph.leaf_names}), None)

    def _corrections(self, stages: Sequence[Stage]) -> list[Corrections]:
        return [self._adapters.corrections(stage) for stage in stages] if self._adapters.loaded else []

    def _leaves(self, stage_idx: int, place: Place | DevicePlace | None) -> dict[str, A]:
        """More than the stage has: its weights, and the arrays of the pass with the rows that belong to it."""
        stage, memory = self._model.stages[stage_idx], self._memory
        assert self._shape is not None
        leaves = {role: memory.vector(spec.name) for role, spec in stage.vectors.items()}
        if place is not None:
            unit = self._unit_of_stage[stage_idx]
            leaves |= {role: memory.matrix(unit, spec.name, place) for role, spec in stage.matrices.items()}
        leaves |= {name: memory.array(name) for name in self._arrays}
        leaves |= {leaf: memory.adapter(key) for leaf, key in self._adapters.keys_of_leaves(stage)}
        if stage.kind is StageKind.ATTENTION:
            for i, first in enumerate(self._firsts):
                leaves[f"k_cache.{i}"], leaves[f"v_cache.{i}"] = memory.keys_and_values(stage.block_idx, first)
        elif stage.kind is StageKind.HEAD:
            leaves["logits"] = memory.logits(self._pieces[stage_idx].start, self._shape.num_outputs)
        return leaves


class DeviceSide(Protocol):
    """Stages that compute on a device, and what crosses between it and RAM in a pass."""

    def take_shape(
        self, shape: ShapeClass, stage_idxs: Sequence[int], firsts: tuple[int, ...], adapters: ActiveAdapters
    ) -> None: ...

    def forget_places(self) -> None: ...

    def take_micro_batches(self, parts: Sequence[PassRows]) -> None:
        """Where keys and values move: bring what the attention of each reads, if there are several."""

    def compute(self, stage_idx: int, micro_batch: int, place: Place | DevicePlace | None) -> None: ...

    def compute_all(self, place_of: Callable[[int], Place | DevicePlace | None]) -> None: ...

    def begin_pass(self, rows: PassRows) -> None:
        """Bring the other inputs of a pass but the hidden state."""

    def bring_hidden(self) -> None:
        """From RAM."""

    def return_results(self) -> None:
        """The hidden state, and of a mixture what its experts are chosen by and read, to RAM."""

    def return_logits(self) -> None:
        """To RAM."""

    def return_normed(self) -> None:
        """To RAM."""


@dataclass(frozen=True, slots=True)
class Sides:
    """`on_device` are the stages of `device`; the CPU computes the others."""

    cpu: Side[int]
    device: DeviceSide | None = None
    on_device: frozenset[int] = frozenset()
