"""Seconds that graphs take on a backend, over bytes of no meaning in two places that are allocated once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graph import Binding, Graph, Workspace
from pipo.compute.graphs import Builder
from pipo.compute.repack import RepackBuffer
from pipo.tiers.ram import Place

Lay = Callable[[Builder], None]
_LEAST_RUNS = 2  # the first finds cold caches, and does not count


class Span(Protocol):
    """Bytes one after another."""

    @property
    def address(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


class AnyMeter(Protocol):
    """On the CPU or on a device."""

    @property
    def weights(self) -> Span: ...

    @property
    def activations(self) -> Span: ...

    def graph_s(self, graph: Graph, addresses: Sequence[Mapping[str, int]], duration_s: float) -> float: ...

    def built(self, lay: Lay, max_nodes: int = 128) -> AbstractContextManager[Graph]: ...


class Meter:
    """Builds graphs and times them. `weights` should exceed the last cache, or what is read once a token looks faster
    than it is; `activations` hold what a graph reads and writes besides. Threads: one, the one that will compute.
    """

    def __init__(
        self, lib: Library, backend: CpuBackend, repack: RepackBuffer | None, weights: Place, activations: Place
    ) -> None:
        self._lib = lib
        self._backend = backend
        self._repack = repack
        self.weights = weights
        self.activations = activations
        _fill(weights)
        _fill(activations)

    @property
    def num_threads(self) -> int:
        return self._backend.num_threads

    def is_repackable(self, type_: TensorType, shape: tuple[int, int]) -> bool:
        return self._repack is not None and self._repack.supports(type_, shape)

    def repack_s(self, type_: TensorType, row_elems: int, num_rows: int, duration_s: float) -> float:
        """Of repacking rows from one half of the weights to the other, on this thread."""
        repack = self._repack
        assert repack is not None
        num_bytes = num_rows * type_.row_bytes(row_elems)
        num_pieces = max(self.weights.num_bytes // 2 // num_bytes, 1)

        def run(i: int) -> None:
            source = self.weights.address + i % num_pieces * num_bytes
            target = source + self.weights.num_bytes // 2
            repack.repack_rows(type_, row_elems, num_rows, source, target)

        return typical_s(run, duration_s)

    def graph_s(self, graph: Graph, addresses: Sequence[Mapping[str, int]], duration_s: float) -> float:
        """Of one run, its leaves at each of `addresses` in turn."""
        bindings: list[Binding] = [graph.binding(each) for each in addresses]

        def run(i: int) -> None:
            graph.bind(bindings[i % len(bindings)])
            graph.run(self._backend)

        return typical_s(run, duration_s)

    def runs_per_s(self, graph: Graph, addresses: Sequence[Mapping[str, int]], duration_s: float) -> float:
        """On average, whatever disturbs them; the first does not count."""
        bindings = [graph.binding(each) for each in addresses]
        num_runs, begin = -1, time.perf_counter()
        while num_runs < 1 or time.perf_counter() - begin < duration_s:
            graph.bind(bindings[num_runs % len(bindings)])
            graph.run(self._backend)
            num_runs += 1
            if not num_runs:
                begin = time.perf_counter()
        return num_runs / (time.perf_counter() - begin)

    @contextmanager
    def built(self, lay: Lay, max_nodes: int = 128) -> Iterator[Graph]:
        """A graph with a workspace of its own."""
        with build(Builder(self._lib, self._repack, max_nodes), Workspace(self._lib), lay) as graph:
            yield graph


@contextmanager
def build(ops: Builder, workspace: Workspace, lay: Lay) -> Iterator[Graph]:
    """A graph, given back with its workspace."""
    try:
        try:
            lay(ops)
        except BaseException:
            ops.free()
            raise
        graph = ops.build(workspace)
        try:
            yield graph
        finally:
            graph.free()
    finally:
        workspace.close()


def typical_s(run: Callable[[int], None], duration_s: float) -> float:
    """Seconds of `run(0)`, `run(1)`, …: the lower quartile of as many as fit, two at least.

    Not the best one: of runs of milliseconds the best is one that nothing else disturbed, which a pass of a hundred
    times that length never is.
    """
    samples: list[float] = []
    end = time.perf_counter() + duration_s
    while len(samples) < _LEAST_RUNS or time.perf_counter() < end:
        begin = time.perf_counter()
        run(len(samples))
        samples.append(time.perf_counter() - begin)
    counted = sorted(samples[1:])
    return max(counted[(len(counted) - 1) // 4], 1e-9)


def pattern() -> npt.NDArray[np.uint8]:
    """A MiB of ordinary numbers in every type: halves of 0.01 to 1, never a denormal, never NaN."""
    return np.random.default_rng(0).integers(0x20, 0x40, MIB, np.uint8)


def _fill(place: Place) -> None:
    bytes_ = pattern()
    for start in range(0, place.num_bytes, MIB):
        num_bytes = min(MIB, place.num_bytes - start)
        place.view[start : start + num_bytes] = bytes_[:num_bytes].data
