"""Graphs of the model's stages, built on first use and kept per shape class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

from pipo.base.adapter import Adapter
from pipo.base.errors import ComputeError
from pipo.base.manifest import HyperParameters
from pipo.base.tensor_type import TensorType
from pipo.compute.device import ComputeDevice
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graph import Graph, Workspace
from pipo.compute.graphs import MAX_NODES, Builder
from pipo.compute.repack import RepackBuffer
from pipo.models.adapters import CorrectionsOf, corrections_of
from pipo.models.stage import Corrections, ExpertShape, ShapeClass, Stage, StageBuilder, StageKind, Sum
from pipo.pipeline.buffers import FEW_TOKENS, row_class
from pipo.pipeline.spans import MAX_GROUPS
from pipo.pipeline.units import WeightLayouts

MAX_GRAPHS = 96  # more than any one request shape needs
MAX_WHOLE_GRAPHS = 4  # of the whole model, for the newest shapes
MAX_EXPERT_GRAPHS = 96
MAX_MIXED_GRAPHS = 32  # of passes whose tokens belong to several groups
MAX_GROUP = 8  # experts in a graph, unless all of a token's are
_NODES_PER_STAGE = 48
_GRAPH_BYTES = 24 << 10  # what one stage's graph touches of its context
_WHOLE_STAGE_BYTES = 12 << 10  # the same, per stage of a whole graph
_NODES_PER_CORRECTION = 20
_CORRECTION_BYTES = 4 << 10  # of a graph, for each
_MIXED_CORRECTION_BYTES = 8 << 10  # the same, where some tokens are apart
_NODES_PER_GROUP = 24
_GROUP_BYTES = 8 << 10  # of a graph, for each group of tokens
_NODES_PER_EXPERT = 24
_EXPERT_BYTES = 8 << 10  # the same as _GRAPH_BYTES, per expert of a graph


def graphs_bytes(num_stages: int, num_experts_per_tok: int = 0, num_sequences: int = 1) -> int:
    """Most that the graphs' own structures take, without the tensors they compute."""
    mixed = _GRAPH_BYTES + min(num_sequences, MAX_GROUPS) * _GROUP_BYTES if num_sequences > 1 else 0
    stages = MAX_GRAPHS * _GRAPH_BYTES + MAX_MIXED_GRAPHS * mixed
    if num_experts_per_tok:
        return stages + MAX_EXPERT_GRAPHS * max(num_experts_per_tok, MAX_GROUP) * _EXPERT_BYTES
    return stages + MAX_WHOLE_GRAPHS * num_stages * _WHOLE_STAGE_BYTES


def correction_bytes(stages: Sequence[Stage], adapters: Sequence[Adapter], num_sequences: int = 1) -> int:
    """Most that graphs' structures take more for what adapters add."""
    counts = [len(corrections_of(adapters)(stage)) for stage in stages]
    num_whole = 0 if any(stage.bank for stage in stages) else MAX_WHOLE_GRAPHS
    mixed = MAX_MIXED_GRAPHS * max(counts, default=0) * _MIXED_CORRECTION_BYTES if num_sequences > 1 else 0
    return (MAX_GRAPHS * max(counts, default=0) + num_whole * sum(counts)) * _CORRECTION_BYTES + mixed


def variants_of(adapters: Sequence[Adapter]) -> list[CorrectionsOf]:
    """What passes may have of these: nothing, each alone, all. Others take no more than all do."""
    sets = [(), *((each,) for each in adapters), *((tuple(adapters),) if len(adapters) > 1 else ())]
    return [corrections_of(each) for each in sets]


@dataclass(frozen=True, slots=True)
class Compute:
    """What graphs are built with and run on: the CPU, with repacked kernels where there are any, or a device."""

    lib: Library
    backend: CpuBackend | DeviceBackend
    repack: RepackBuffer | None = None

    @property
    def device(self) -> ComputeDevice | None:
        return self.backend.device if isinstance(self.backend, DeviceBackend) else None

    def close(self) -> None:
        self.backend.close()
        if self.repack is not None:
            self.repack.close()


def compute_on_cpu(lib: Library, num_threads: int) -> tuple[Compute, CpuBackend]:
    """With repacked kernels where there are any, and its backend. Raises LibraryError."""
    backend = CpuBackend(lib, num_threads)
    try:
        return Compute(lib, backend, RepackBuffer.find(lib)), backend
    except BaseException:
        backend.close()
        raise


class StageGraphs:
    """`get` gives the graph of a stage for a shape class; equal stages share one. Threads: one."""

    def __init__(self, compute: Compute, hyper: HyperParameters, layouts: WeightLayouts) -> None:
        self._compute = compute
        self._hyper = hyper
        self._layouts = layouts
        self._workspace = Workspace(compute.lib, compute.device)
        self._graphs: OrderedDict[tuple[int, ShapeClass, Corrections], Graph] = OrderedDict()
        self._mixed: OrderedDict[tuple[int, ShapeClass, Corrections], Graph] = OrderedDict()
        self._whole: OrderedDict[tuple[int, ShapeClass, tuple[Corrections, ...]], Graph] = OrderedDict()
        self._of_experts: OrderedDict[tuple[int, ExpertShape], Graph] = OrderedDict()
        self._numbers: dict[int, int] = {}  # of the stage of this id: equal for those that share graphs
        self._signatures: dict[tuple[object, ...], int] = {}

    def measure(self, stages: Sequence[Stage], shapes: Sequence[ShapeClass], adapters: Sequence[Adapter] = ()) -> int:
        """Bytes of intermediates and scratch that the largest of these graphs needs. Allocates next to nothing."""
        workspace = work = 0
        for graph in self._largest(stages, shapes, adapters):
            workspace = max(workspace, self._workspace.measure(graph))
            work = max(work, self._work_bytes(graph))
            graph.free()
        return workspace + work

    def _work_bytes(self, graph: Graph) -> int:
        """Scratch beside the workspace; what a device's driver takes for itself is not known."""
        backend = self._compute.backend
        return graph.work_bytes(backend.num_threads) if isinstance(backend, CpuBackend) else 0

    def reserve(self, stages: Sequence[Stage], shapes: Sequence[ShapeClass], adapters: Sequence[Adapter] = ()) -> None:
        """Make room for the largest shapes, before any graph is used. Graphs there were are built anew."""
        self._free_graphs()
        self._workspace.close()
        self._workspace = Workspace(self._compute.lib, self._compute.device)
        for graph in self._largest(stages, shapes, adapters):
            self._workspace.reserve(graph)
            graph.free()

    def _largest(
        self, stages: Sequence[Stage], shapes: Sequence[ShapeClass], adapters: Sequence[Adapter]
    ) -> Iterator[Graph]:
        for of, shape in product(variants_of(adapters), shapes):
            distinct = list({(self._number(stage), of(stage)): stage for stage in stages}.values())
            for stage in distinct:
                if stage.bank is None:
                    yield self._lay(stage, _relevant(stage.kind, shape, of(stage)), of(stage)).finish()
                for expert_shape in _largest_of_experts(stage, shape.num_tokens):
                    yield self._lay_experts(stage, expert_shape).finish()
            if shape.is_plain and not any(stage.bank for stage in stages):
                yield self._lay_all(distinct, shape, [of(stage) for stage in distinct]).finish()

    def get(self, stage: Stage, shape: ShapeClass, corrections: Corrections = ()) -> Graph:
        """`corrections` are what adapters add to its products."""
        shape = _relevant(stage.kind, shape, corrections)
        key = (self._number(stage), shape, corrections)
        kept, most = (self._mixed, MAX_MIXED_GRAPHS) if _is_mixed(shape) else (self._graphs, MAX_GRAPHS)
        graph = kept.get(key)
        if graph is None:
            graph = kept[key] = self._lay(stage, shape, corrections).build(self._workspace)
            if len(kept) > most:
                kept.popitem(last=False)[1].free()
        else:
            kept.move_to_end(key)
        return graph

    def get_experts(self, stage: Stage, shape: ExpertShape) -> Graph:
        """Of a stage of experts. Leaves of the expert in place i are named `name.i`."""
        key = (self._number(stage), shape)
        graph = self._of_experts.get(key)
        if graph is None:
            graph = self._of_experts[key] = self._lay_experts(stage, shape).build(self._workspace)
            if len(self._of_experts) > MAX_EXPERT_GRAPHS:
                self._of_experts.popitem(last=False)[1].free()
        else:
            self._of_experts.move_to_end(key)
        return graph

    def get_whole(self, stages: Sequence[Stage], shape: ShapeClass, corrections: Sequence[Corrections] = ()) -> Graph:
        """One graph of all these stages: what a pass over a model that is all in RAM runs. Leaves of stage i are
        named `i.name`. Saves the start of sixty graphs: 6 % of a pass of a 135M model.

        `corrections` by stage; of none of them where it is empty.
        """
        key = (len(stages), shape, tuple(corrections))
        graph = self._whole.get(key)
        if graph is None:
            graph = self._whole[key] = self._lay_all(stages, shape, corrections).build(self._workspace)
            if len(self._whole) > MAX_WHOLE_GRAPHS:
                self._whole.popitem(last=False)[1].free()
        return graph

    def run(self, graph: Graph) -> None:
        """Compute and wait. Raises Cancelled, ComputeError."""
        graph.run(self._compute.backend)

    def close(self) -> None:
        self._free_graphs()
        self._workspace.close()

    def _free_graphs(self) -> None:
        for graphs in (self._graphs, self._mixed, self._whole, self._of_experts):
            while graphs:
                graphs.popitem()[1].free()

    def _number(self, stage: Stage) -> int:
        number = self._numbers.get(id(stage))
        if number is None:
            signature = stage.signature(self._layouts.is_repacked)
            number = self._numbers[id(stage)] = self._signatures.setdefault(signature, len(self._signatures))
        return number

    def _lay(self, stage: Stage, shape: ShapeClass, corrections: Corrections) -> Builder:
        num_more = _NODES_PER_CORRECTION * len(corrections) + _NODES_PER_GROUP * len(shape.groups)
        with self._builder(MAX_NODES + num_more) as ops:
            self._lay_one(ops, stage, shape, corrections)
        return ops

    def _lay_one(self, ops: Builder, stage: Stage, shape: ShapeClass, corrections: Corrections) -> None:
        builder = StageBuilder(ops, self._hyper, shape, stage, self._layouts.is_repacked, corrections)
        stage.lay(builder)
        if builder.num_corrected != len(corrections):
            raise ComputeError(f"an adapter has parts for a product of {stage.kind.value} that takes none")

    def _lay_experts(self, stage: Stage, shape: ExpertShape) -> Builder:
        assert stage.bank is not None
        max_nodes = _NODES_PER_EXPERT * (max(shape.num_experts, stage.bank.num_experts_per_tok) + 1)
        with self._builder(max_nodes) as ops:
            stage.bank.lay(StageBuilder(ops, self._hyper, _NO_SHAPE, stage, self._layouts.is_repacked), shape)
        return ops

    def _lay_all(self, stages: Sequence[Stage], shape: ShapeClass, corrections: Sequence[Corrections]) -> Builder:
        num_corrections = sum(map(len, corrections))
        with self._builder(_NODES_PER_STAGE * len(stages) + _NODES_PER_CORRECTION * num_corrections) as ops:
            for i, stage in enumerate(stages):
                ops.prefix = f"{i}."
                self._lay_one(ops, stage, shape, corrections[i] if corrections else ())
        return ops

    @contextmanager
    def _builder(self, max_nodes: int = MAX_NODES) -> Iterator[Builder]:
        """For the block to lay ops with; freed where that fails."""
        ops = Builder(self._compute.lib, self._compute.repack, max_nodes=max_nodes)
        try:
            yield ops
        except BaseException:
            ops.free()
            raise


def _largest_of_experts(stage: Stage, num_tokens: int) -> Iterator[ExpertShape]:
    """Of every way to add, the graph that takes most."""
    if stage.bank is None:
        return
    few = min(num_tokens, FEW_TOKENS)
    yield ExpertShape(Sum.AT_ONCE, 1, stage.bank.num_experts_per_tok)
    yield ExpertShape(Sum.LATER, few + 1, max(MAX_GROUP, stage.bank.num_experts_per_tok), row_class(few))
    yield ExpertShape(Sum.NOW, few)
    yield ExpertShape(Sum.IN_ORDER, num_tokens + 1, 1, row_class(num_tokens))


_NO_SHAPE = ShapeClass(1, (), 1, TensorType.F16, TensorType.F16)  # experts look at their own


def _relevant(kind: StageKind, shape: ShapeClass, corrections: Corrections) -> ShapeClass:
    """The shape with what this kind of stage does not look at set to one, so that its graph is shared."""
    num_apart = shape.num_apart if corrections else 0
    if kind is StageKind.ATTENTION:
        return replace(shape, num_outputs=1, num_apart=num_apart)
    if kind is StageKind.MLP:
        return replace(shape, num_outputs=1, groups=(), num_apart=num_apart)
    if kind is StageKind.FINAL_NORM:
        return replace(shape, groups=(), num_apart=0)
    return replace(shape, groups=(), num_apart=0, num_tokens=1)


def _is_mixed(shape: ShapeClass) -> bool:
    """Its graph has parts for tokens of several kinds."""
    return bool(shape.groups and not shape.is_plain) or 0 < shape.num_apart < shape.num_tokens
