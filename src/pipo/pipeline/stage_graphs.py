"""Graphs of the model's stages, built on first use and kept per shape class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipo.base.manifest import HyperParameters
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graphs import Builder, Graph, Workspace
from pipo.compute.repack import RepackBuffer
from pipo.models.stage import ShapeClass, Stage, StageBuilder, StageKind
from pipo.pipeline.units import WeightLayouts

MAX_GRAPHS = 96  # of about 30 KiB each: more than any one request shape needs
GRAPH_BYTES = 48 << 10


@dataclass(frozen=True, slots=True)
class Compute:
    """What graphs are built with and run on."""

    lib: Library
    backend: CpuBackend
    repack: RepackBuffer | None

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
        self._workspace = Workspace(compute.lib)
        self._graphs: OrderedDict[tuple[object, ...], Graph] = OrderedDict()
        self._signatures: dict[int, tuple[object, ...]] = {}

    def measure(self, stages: Sequence[Stage], shape: ShapeClass) -> int:
        """Bytes of intermediates and scratch that the largest of these graphs needs. Allocates next to nothing."""
        workspace = work = 0
        for stage in self._distinct(stages):
            graph = self._lay(stage, _relevant(stage.kind, shape)).finish()
            workspace = max(workspace, self._workspace.measure(graph))
            work = max(work, graph.work_bytes(self._compute.backend.num_threads))
            graph.free()
        return workspace + work

    def reserve(self, stages: Sequence[Stage], shape: ShapeClass) -> None:
        """Make room for the largest shape, once, before any graph is used."""
        for stage in self._distinct(stages):
            graph = self._lay(stage, _relevant(stage.kind, shape)).finish()
            self._workspace.reserve(graph)
            graph.free()

    def get(self, stage: Stage, shape: ShapeClass) -> Graph:
        key = (self._signature(stage), _relevant(stage.kind, shape))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._lay(stage, _relevant(stage.kind, shape)).build(self._workspace)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].free()
        else:
            self._graphs.move_to_end(key)
        return graph

    def close(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].free()
        self._workspace.close()

    def _signature(self, stage: Stage) -> tuple[object, ...]:
        signature = self._signatures.get(id(stage))
        if signature is None:
            signature = self._signatures[id(stage)] = stage.signature(self._layouts.is_repacked)
        return signature

    def _distinct(self, stages: Sequence[Stage]) -> list[Stage]:
        return list({self._signature(stage): stage for stage in stages}.values())

    def _lay(self, stage: Stage, shape: ShapeClass) -> Builder:
        ops = Builder(self._compute.lib, self._compute.repack)
        try:
            stage.lay(StageBuilder(ops, self._hyper, shape, stage, self._layouts.is_repacked))
        except BaseException:
            ops.free()
            raise
        return ops


def _relevant(kind: StageKind, shape: ShapeClass) -> ShapeClass:
    """The shape with what this kind of stage does not look at set to one, so that its graph is shared."""
    if kind is StageKind.ATTENTION:
        return replace(shape, num_outputs=1)
    if kind is StageKind.MLP:
        return replace(shape, num_outputs=1, num_kv_rows=1)
    if kind is StageKind.FINAL_NORM:
        return replace(shape, num_kv_rows=1)
    return replace(shape, num_kv_rows=1, num_tokens=1)
