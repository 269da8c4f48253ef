"""The KV cache as it grows, and the units that stay in RAM until it needs the memory they borrow."""

from __future__ import annotations

from dataclasses import dataclass

from pipo.base.units import round_up
from pipo.kvcache.cache import ROWS_PER_PAGE, KvShape
from pipo.pipeline.executor import Executor
from pipo.planner.placement import Placement
from pipo.planner.residency import UnitId
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, GrowingMemory


@dataclass(frozen=True, slots=True)
class _Tenant:
    """A unit that borrows memory, and where it lives."""

    unit_id: UnitId
    home: Arena


class KvRoom:
    """Before each pass, gives keys and values the memory of the positions that the pass will have stored, and weights
    what is left of it. Close it to give all of it back. Threads: one at a time.

    `memory` holds a cache of `shape`.
    """

    def __init__(
        self, shape: KvShape, memory: GrowingMemory, placement: Placement, executor: Executor, ledger: Ledger
    ) -> None:
        self._shape = shape
        self._memory = memory
        self._placement = placement
        self._executor = executor
        self._ledger = ledger
        self._num_rows = 0
        self._first_row = 0  # that layers which slide have, of the positions stored since the last start
        self._tenants: list[_Tenant] = []

    def begin(self) -> None:
        """Positions are stored from the first one on again."""
        self._first_row = 0

    def has_window(self, position: int, sliding_window: int) -> bool:
        """All that a token at this position sees is there, as far as it was stored."""
        return self._first_row <= max(position - sliding_window + 1, 0)

    def hold(self, num_positions: int) -> bool:
        """Positions beyond these are forgotten. Whether a unit has moved: what computes with it has to look for it.

        Units move between two passes, by being read where they are needed next. Raises Cancelled where a transfer had
        to be waited for; calling again goes on from there.
        """
        num_rows = round_up(num_positions, ROWS_PER_PAGE)
        if num_rows == self._num_rows:
            return False
        before = list(self._tenants)
        staying = self._placement.staying(num_rows)
        while len(self._tenants) > len(staying):
            self._move_out(self._tenants[-1])
        self._first_row = max(self._first_row, self._shape.first_row(num_rows))
        for start, end in self._shape.unused_ranges(num_rows) if num_rows < self._num_rows or self._first_row else ():
            self._memory.drop(start, end - start)
        self._memory.charge(self._shape.used_bytes(num_rows))
        for borrower in staying[len(self._tenants) :]:
            self._move_in(UnitId(borrower.unit_idx), borrower.place_bytes)
        self._num_rows = num_rows
        return self._tenants != before

    def _move_in(self, unit_id: UnitId, num_bytes: int) -> None:
        home = Arena(num_bytes, name="resident weights", ledger=self._ledger)
        try:
            self._executor.move_in(unit_id, home.take(num_bytes))
        except BaseException:
            home.close()
            raise
        self._tenants.append(_Tenant(unit_id, home))

    def _move_out(self, tenant: _Tenant) -> None:
        self._executor.move_out(tenant.unit_id, self._placement.slot_class[tenant.unit_id])
        self._tenants.remove(tenant)
        tenant.home.close()

    def close(self) -> None:
        """Closing again does nothing. Whatever reads into a home has ended, or keeps its memory until it does."""
        while self._tenants:
            self._tenants.pop().home.close()
