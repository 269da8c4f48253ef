"""Adapters that come and go between the requests of a running engine, within what its plan has left of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from pipo.base.adapter import Adapter, AdapterId, NamedAdapter
from pipo.base.errors import OverBudget
from pipo.base.units import MIB, format_size
from pipo.models.stage import Stage
from pipo.pipeline.adapters import AdapterStore, LoadedAdapter
from pipo.pipeline.graph_room import GraphRoom
from pipo.pipeline.stage_graphs import correction_bytes
from pipo.tiers.ledger import Ledger


class DevicePart(Protocol):
    """What of adapters lies on a device."""

    def add_adapter(self, loaded: LoadedAdapter, adapters: Sequence[Adapter]) -> None:
        """`adapters` are all there will be. Raises OverBudget, OutOfDeviceMemory; then nothing has changed."""

    def remove_adapter(self, adapter_id: AdapterId) -> None: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """`spare_bytes` of RAM are not planned for anything. `num_sequences` may share a pass."""

    ledger: Ledger
    spare_bytes: int
    num_sequences: int


class AdapterRoom:
    """Threads: one, between passes. What was bound before must be bound again after each call."""

    def __init__(
        self, store: AdapterStore, stages: Sequence[Stage], graphs: GraphRoom, device: DevicePart | None, budget: Budget
    ) -> None:
        self.store = store
        self._stages = stages
        self._graphs = graphs
        self._device = device
        self._ledger = budget.ledger
        self._spare_bytes = budget.spare_bytes
        self._num_sequences = budget.num_sequences
        self._planned_bytes = self._correction_bytes(self._adapters)
        self._structures = budget.ledger.reserve("graphs", 0)  # of graphs, beyond those that the plan counted

    @property
    def _adapters(self) -> list[Adapter]:
        return [named.adapter for named in self.store.named.values()]

    def add(self, named: NamedAdapter) -> None:
        """Raises OverBudget, OutOfDeviceMemory, TransferError; then nothing has changed."""
        all_of_them = [*self._adapters, named.adapter]
        structures = self._structure_bytes(all_of_them) - self._structures.num_bytes
        more = self._graphs.bytes_more(all_of_them)
        needed = self.store.bytes_of(named.adapter) + structures + more
        if needed > self._spare_bytes:
            raise self._over_budget(named, needed)
        with ExitStack() as undo:
            loaded = self.store.load(named)
            undo.callback(self.store.unload, named.id)
            undo.callback(self._structures.resize, self._structures.num_bytes)
            self._structures.resize(self._structures.num_bytes + structures)
            if self._device is not None:
                self._device.add_adapter(loaded, all_of_them)
                undo.callback(self._device.remove_adapter, named.id)
            self._graphs.hold(all_of_them)
            undo.pop_all()
        self._spare_bytes -= needed

    def remove(self, adapter_id: AdapterId) -> None:
        """One that is loaded: its memory is free for others."""
        named = self.store.named[adapter_id]
        if self._device is not None:
            self._device.remove_adapter(adapter_id)
        self.store.unload(adapter_id)
        self._spare_bytes += self.store.bytes_of(named.adapter)
        left = self._structure_bytes(self._adapters)
        self._spare_bytes += self._structures.num_bytes - left
        self._structures.resize(left)

    def _structure_bytes(self, adapters: Sequence[Adapter]) -> int:
        """Of graphs, beyond those that the plan counted. What several add is not the sum of what each adds."""
        return max(self._correction_bytes(adapters) - self._planned_bytes, 0)

    def _correction_bytes(self, adapters: Sequence[Adapter]) -> int:
        return correction_bytes(self._stages, adapters, self._num_sequences)

    def _over_budget(self, named: NamedAdapter, needed: int) -> OverBudget:
        smallest = self._ledger.limit_bytes + needed - self._spare_bytes
        return OverBudget(
            f"adapter {named.id:.80} needs {format_size(needed)} of RAM, the plan leaves "
            f"{format_size(self._spare_bytes)} of the limit of {format_size(self._ledger.limit_bytes)}",
            smallest_bytes=smallest,
            hint=f"--ram {-(-smallest // MIB)}MiB has room, and so has a plan made with the adapter",
        )

    def close(self) -> None:
        """Closing again does nothing."""
        self._structures.close()
