"""The memory that one side's graphs compute in: charged, and made larger where adapters ask for it."""

from __future__ import annotations

from collections.abc import Sequence

from pipo.base.adapter import Adapter
from pipo.models.stage import ShapeClass, Stage
from pipo.pipeline.stage_graphs import StageGraphs
from pipo.tiers.ledger import Ledger


class GraphRoom:
    """Room for the graphs of `stages` up to the largest shapes, with some adapters. Threads: one, between passes.

    Raises OverBudget, ComputeError.
    """

    def __init__(
        self,
        graphs: StageGraphs,
        stages: Sequence[Stage],
        shapes: Sequence[ShapeClass],
        ledger: Ledger,
        adapters: Sequence[Adapter],
    ) -> None:
        self._graphs = graphs
        self._stages = stages
        self._shapes = shapes
        self._adapters = adapters
        self._reservation = ledger.reserve("activations", graphs.measure(stages, shapes, adapters))
        try:
            graphs.reserve(stages, shapes, adapters)
        except BaseException:
            self._reservation.close()
            raise

    def bytes_more(self, adapters: Sequence[Adapter]) -> int:
        """Than there is room for now."""
        return max(0, self._graphs.measure(self._stages, self._shapes, adapters) - self._reservation.num_bytes)

    def hold(self, adapters: Sequence[Adapter]) -> None:
        """Make room for graphs with these; all graphs are built anew. After an error there is room for those before."""
        before = self._reservation.num_bytes
        self._reservation.resize(before + self.bytes_more(adapters))
        try:
            self._graphs.reserve(self._stages, self._shapes, adapters)
        except BaseException:
            self._graphs.reserve(self._stages, self._shapes, self._adapters)
            self._reservation.resize(before)
            raise
        self._adapters = adapters

    def close(self) -> None:
        self._reservation.close()
