"""The KV cache as it grows, and the units that stay in RAM until it needs the memory they borrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipo.base.units import round_up
from pipo.kvcache.cache import ROWS_PER_PAGE, KvCache
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
    """Before each pass, gives keys and values the memory of the positions that the pass will have stored, sequence by
    sequence, and weights what is left of it. Close it to give all of it back. Threads: one at a time.

    `memory` holds the cache.
    """

    def __init__(
        self, cache: KvCache, memory: GrowingMemory, placement: Placement, executor: Executor, ledger: Ledger
    ) -> None:
        self._cache = cache
        self._shape = cache.shape
        self._memory = memory
        self._placement = placement
        self._executor = executor
        self._ledger = ledger
        self._num_rows = [0] * cache.shape.num_sequences  # that have memory
        self._first_row = 0  # that layers which slide have, of the positions stored since the last start
        self._tenants: list[_Tenant] = []
        self._may_grow = True  # units that may borrow memory have not all come in

    @property
    def num_layers(self) -> int:
        """Whose keys and values are here."""
        return self._shape.num_layers

    def begin(self) -> None:
        """Positions are stored from the first one on again."""
        self._first_row = 0

    def has_window(self, position: int, sliding_window: int) -> bool:
        """All that a token at this position sees is there, as far as it was stored."""
        return self._first_row <= max(position - sliding_window + 1, 0)

    def hold(self, num_positions: Sequence[int]) -> bool:
        """So many of each sequence; those beyond are forgotten. Whether a unit has moved: what computes with it has to
        look for it.

        Units move between two passes, by being read where they are needed next. Raises Cancelled where a transfer had
        to be waited for; calling again goes on from there.
        """
        num_rows = [round_up(num, ROWS_PER_PAGE) for num in num_positions]
        if num_rows == self._num_rows and not self._may_grow:
            return False
        self._may_grow = True
        before = list(self._tenants)
        # a page of the placement is so many rows of every sequence: what all have together is what counts
        staying = self._placement.staying(sum(num_rows) / len(num_rows))
        while len(self._tenants) > len(staying):
            self._move_out(self._tenants[-1])
        self._take(num_rows)
        for borrower in staying[len(self._tenants) :]:
            self._move_in(UnitId(borrower.unit_idx), borrower.place_bytes)
        self._may_grow = False
        return self._tenants != before

    def release(self, sequence: int) -> None:
        """Its memory goes back at once; units that may have it come in before the next pass."""
        self._take([0 if i == sequence else num for i, num in enumerate(self._num_rows)])
        self._may_grow = True

    def copy_rows(self, source: int, target: int, num_positions: int) -> None:
        """Keys and values of the first positions of one sequence, for which `target` has memory already."""
        self._cache.copy_rows(source, target, num_positions)

    def _take(self, num_rows: list[int]) -> None:
        """Memory for so many rows of each sequence, from units that have left it."""
        if len(num_rows) == 1:  # several keep what slides
            self._first_row = max(self._first_row, self._shape.first_row(num_rows[0]))
        for sequence, (num, held) in enumerate(zip(num_rows, self._num_rows, strict=True)):
            for start, end in self._shape.unused_ranges(sequence, num) if num < held or self._first_row else ():
                self._memory.drop(start, end - start)
        self._memory.charge(self._shape.used_bytes_of(num_rows))
        self._num_rows = num_rows

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
