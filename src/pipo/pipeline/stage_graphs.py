"""Graphs of the model's stages, built on first use and kept per shape class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipo.base.manifest import HyperParameters
from pipo.base.tensor_type import TensorType
from pipo.compute.device import ComputeDevice
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graph import Graph, Workspace
from pipo.compute.graphs import MAX_NODES, Builder
from pipo.compute.repack import RepackBuffer
from pipo.models.stage import ExpertShape, ShapeClass, Stage, StageBuilder, StageKind, Sum
from pipo.pipeline.buffers import FEW_TOKENS, row_class
from pipo.pipeline.units import WeightLayouts

MAX_GRAPHS = 96  # more than any one request shape needs
MAX_WHOLE_GRAPHS = 4  # of the whole model, for the newest shapes
MAX_EXPERT_GRAPHS = 96
MAX_GROUP = 8  # experts in a graph, unless all of a token's are
_NODES_PER_STAGE = 48
_GRAPH_BYTES = 24 << 10  # what one stage's graph touches of its context
_WHOLE_STAGE_BYTES = 12 << 10  # the same, per stage of a whole graph
_NODES_PER_EXPERT = 24
_EXPERT_BYTES = 8 << 10  # the same as _GRAPH_BYTES, per expert of a graph


def graphs_bytes(num_stages: int, num_experts_per_tok: int = 0) -> int:
    """Most that the graphs' own structures take, without the tensors they compute."""
    if num_experts_per_tok:
        group = max(num_experts_per_tok, MAX_GROUP)
        return MAX_GRAPHS * _GRAPH_BYTES + MAX_EXPERT_GRAPHS * group * _EXPERT_BYTES
    return MAX_GRAPHS * _GRAPH_BYTES + MAX_WHOLE_GRAPHS * num_stages * _WHOLE_STAGE_BYTES


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


class StageGraphs:
    """`get` gives the graph of a stage for a shape class; equal stages share one. Threads: one."""

    def __init__(self, compute: Compute, hyper: HyperParameters, layouts: WeightLayouts) -> None:
        self._compute = compute
        self._hyper = hyper
        self._layouts = layouts
        self._workspace = Workspace(compute.lib, compute.device)
        self._graphs: OrderedDict[tuple[int, ShapeClass], Graph] = OrderedDict()
        self._whole: OrderedDict[tuple[int, ShapeClass], Graph] = OrderedDict()
        self._of_experts: OrderedDict[tuple[int, ExpertShape], Graph] = OrderedDict()
        self._numbers: dict[int, int] = {}  # of the stage of this id: equal for those that share graphs
        self._signatures: dict[tuple[object, ...], int] = {}

    def measure(self, stages: Sequence[Stage], shape: ShapeClass) -> int:
        """Bytes of intermediates and scratch that the largest of these graphs needs. Allocates next to nothing."""
        workspace = work = 0
        for graph in self._largest(stages, shape):
            workspace = max(workspace, self._workspace.measure(graph))
            work = max(work, self._work_bytes(graph))
            graph.free()
        return workspace + work

    def _work_bytes(self, graph: Graph) -> int:
        """Scratch beside the workspace; what a device's driver takes for itself is not known."""
        backend = self._compute.backend
        return graph.work_bytes(backend.num_threads) if isinstance(backend, CpuBackend) else 0

    def reserve(self, stages: Sequence[Stage], shape: ShapeClass) -> None:
        """Make room for the largest shape, once, before any graph is used."""
        for graph in self._largest(stages, shape):
            self._workspace.reserve(graph)
            graph.free()

    def _largest(self, stages: Sequence[Stage], shape: ShapeClass) -> Iterator[Graph]:
        distinct = self._distinct(stages)
        for stage in distinct:
            if stage.bank is None:
                yield self._lay(stage, _relevant(stage.kind, shape)).finish()
            for expert_shape in _largest_of_experts(stage, shape.num_tokens):
                yield self._lay_experts(stage, expert_shape).finish()
        if not any(stage.bank for stage in stages):
            yield self._lay_all(distinct, shape).finish()

    def get(self, stage: Stage, shape: ShapeClass) -> Graph:
        key = (self._number(stage), _relevant(stage.kind, shape))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._lay(stage, _relevant(stage.kind, shape)).build(self._workspace)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].free()
        else:
            self._graphs.move_to_end(key)
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

    def get_whole(self, stages: Sequence[Stage], shape: ShapeClass) -> Graph:
        """One graph of all these stages: what a pass over a model that is all in RAM runs. Leaves of stage i are
        named `i.name`. Saves the start of sixty graphs: 6 % of a pass of a 135M model.
        """
        key = (len(stages), shape)
        graph = self._whole.get(key)
        if graph is None:
            graph = self._whole[key] = self._lay_all(stages, shape).build(self._workspace)
            if len(self._whole) > MAX_WHOLE_GRAPHS:
                self._whole.popitem(last=False)[1].free()
        return graph

    def run(self, graph: Graph) -> None:
        """Compute and wait. Raises Cancelled, ComputeError."""
        graph.run(self._compute.backend)

    def close(self) -> None:
        for graphs in (self._graphs, self._whole, self._of_experts):
            while graphs:
                graphs.popitem()[1].free()
        self._workspace.close()

    def _number(self, stage: Stage) -> int:
        number = self._numbers.get(id(stage))
        if number is None:
            signature = stage.signature(self._layouts.is_repacked)
            number = self._numbers[id(stage)] = self._signatures.setdefault(signature, len(self._signatures))
        return number

    def _distinct(self, stages: Sequence[Stage]) -> list[Stage]:
        return list({self._number(stage): stage for stage in stages}.values())

    def _lay(self, stage: Stage, shape: ShapeClass) -> Builder:
        with self._builder() as ops:
            stage.lay(StageBuilder(ops, self._hyper, shape, stage, self._layouts.is_repacked))
        return ops

    def _lay_experts(self, stage: Stage, shape: ExpertShape) -> Builder:
        assert stage.bank is not None
        max_nodes = _NODES_PER_EXPERT * (max(shape.num_experts, stage.bank.num_experts_per_tok) + 1)
        with self._builder(max_nodes) as ops:
            stage.bank.lay(StageBuilder(ops, self._hyper, _NO_SHAPE, stage, self._layouts.is_repacked), shape)
        return ops

    def _lay_all(self, stages: Sequence[Stage], shape: ShapeClass) -> Builder:
        with self._builder(_NODES_PER_STAGE * len(stages)) as ops:
            for i, stage in enumerate(stages):
                ops.prefix = f"{i}."
                stage.lay(StageBuilder(ops, self._hyper, shape, stage, self._layouts.is_repacked))
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


_NO_SHAPE = ShapeClass(1, 1, 1, TensorType.F16, TensorType.F16)  # experts look at their own


def _relevant(kind: StageKind, shape: ShapeClass) -> ShapeClass:
    """The shape with what this kind of stage does not look at set to one, so that its graph is shared."""
    if kind is StageKind.ATTENTION:
        return replace(shape, num_outputs=1)
    if kind is StageKind.MLP:
        return replace(shape, num_outputs=1, num_kv_rows=1)
    if kind is StageKind.FINAL_NORM:
        return replace(shape, num_kv_rows=1)
    return replace(shape, num_kv_rows=1, num_tokens=1)
