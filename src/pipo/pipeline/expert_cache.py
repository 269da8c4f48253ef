"""Which experts are in RAM, and which of them the next one replaces.

The one to go is the one that is wanted again last, as far as one can tell: an expert of block b that a share p of the
tokens pass comes up after the blocks until b, and then after 1/p - 1 rounds of all blocks more. The share is that of
recent tokens, with a half-life; an endless one would make this LFU, a short one LRU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipo.planner.residency import SlotId, UnitId

HALF_LIFE_TOKENS = 16.0  # docs/log.md
RANKED = 32  # of those that may go, as many are looked up at once
LEAST_SHARE = 1e-4  # of tokens: below it the order of blocks decides


@dataclass(frozen=True, slots=True)
class ExpertIds:
    """Experts are numbered block by block after all other units: `first`, first + 1, …"""

    first: int
    num_blocks: int
    num_experts: int  # of a block

    def unit(self, block: int, expert: int) -> UnitId:
        return UnitId(self.first + block * self.num_experts + expert)

    def units(self, block: int, experts: Iterable[int]) -> list[UnitId]:
        base = self.first + block * self.num_experts
        return [UnitId(base + expert) for expert in experts]

    def split(self, unit: UnitId) -> tuple[int, int]:
        """Its block, counted among those with experts, and its number there."""
        return divmod(unit - self.first, self.num_experts)


class ExpertCache:
    """Slots, the experts that hold them, and how often each expert was wanted. Threads: one.

    `slot_class` gives the class of slots that the experts of a block fit, as an index into `free`.
    """

    def __init__(
        self,
        ids: ExpertIds,
        slot_class: Sequence[int],
        free: Sequence[deque[SlotId]],
        half_life_tokens: float = HALF_LIFE_TOKENS,
    ) -> None:
        self.ids = ids
        self.held: dict[UnitId, SlotId] = {}
        self._slot_class = slot_class
        self._unread = [UnitId(ids.first + i) for i in reversed(range(ids.num_blocks * ids.num_experts))]
        self._free = free
        self._half_life_tokens = half_life_tokens
        shape = ids.num_blocks, ids.num_experts
        self._may_go = np.zeros(shape, np.bool_)  # held, and nobody has asked to keep it
        self._wanted = np.zeros(shape)  # decayed count of tokens
        self._seen = LEAST_SHARE  # decayed count of all tokens
        self._in_class = [np.asarray(slot_class)[:, None] == i for i in range(len(free))]
        # blocks until each is wanted, but for those of the round under way
        self._rounds_away = np.full(shape, ids.num_blocks * (1 / LEAST_SHARE - 1))
        self._ranked_at = -1
        self._next_to_go: list[deque[UnitId]] = [deque() for _ in free]

    def owns(self, unit: UnitId) -> bool:
        return unit >= self.ids.first

    def slot_for(self, unit: UnitId) -> SlotId | None:
        """A free one it fits; None where another has to go first."""
        free = self._free[self._slot_class[self.ids.split(unit)[0]]]
        return free[0] if free else None

    def never_read(self) -> tuple[UnitId, SlotId] | None:
        """An expert that no slot holds, and a free one it fits, as long as none had to go."""
        while self._unread:
            unit = self._unread[-1]
            slot = self.slot_for(unit)
            if unit not in self.held and slot is not None:
                return unit, slot
            self._unread.pop()
        return None

    def first_to_go(self, unit: UnitId, at_block: int) -> UnitId | None:
        """Whose slot `unit` should take, while block `at_block` computes; None where all are kept."""
        slot_class = self._slot_class[self.ids.split(unit)[0]]
        if at_block != self._ranked_at:
            self._ranked_at = at_block
            self._forget_ranks()
        ranked = self._next_to_go[slot_class]
        if not ranked:
            ranked = self._next_to_go[slot_class] = self._ranked(slot_class, at_block)
        while ranked:
            found = ranked.popleft()
            if self._may_go[self.ids.split(found)]:
                return found
        return None

    def take(self, unit: UnitId, slot: SlotId) -> None:
        self._free[self._slot_class[self.ids.split(unit)[0]]].remove(slot)
        self.held[unit] = slot
        self._may_go[self.ids.split(unit)] = True

    def give_back(self, unit: UnitId) -> None:
        self._free[self._slot_class[self.ids.split(unit)[0]]].append(self.held.pop(unit))
        self._may_go[self.ids.split(unit)] = False

    def keep(self, units: Collection[UnitId]) -> None:
        """Those of them that are held stay until they are let go."""
        for unit in units:
            self._may_go[self.ids.split(unit)] = False

    def let_go(self, units: Collection[UnitId]) -> None:
        for unit in units:
            self._may_go[self.ids.split(unit)] = unit in self.held

    def let_all_go(self) -> None:
        for unit in self.held:
            self._may_go[self.ids.split(unit)] = True

    def note(self, used: npt.NDArray[np.int64], num_tokens: int) -> None:
        """A pass of so many tokens is over; `used` (blocks, experts) of them went through each expert."""
        kept = 0.5 ** (num_tokens / self._half_life_tokens)
        self._wanted = self._wanted * kept + used * ((1 - kept) / num_tokens)
        self._seen = self._seen * kept + 1 - kept
        shares = np.maximum(self._wanted / self._seen, LEAST_SHARE)
        self._rounds_away = self.ids.num_blocks * (1 / shares - 1)
        self._forget_ranks()

    def _forget_ranks(self) -> None:
        for ranked in self._next_to_go:
            ranked.clear()

    def _ranked(self, slot_class: int, at_block: int) -> deque[UnitId]:
        """Those that may go, the one wanted last first; the first few of them."""
        blocks = self.ids.num_blocks
        until = (np.arange(blocks) - at_block - 1) % blocks + 1
        candidates = np.flatnonzero(self._may_go & self._in_class[slot_class])
        nearness = -(self._rounds_away + until[:, None]).ravel()[candidates]
        if len(candidates) > RANKED:
            nearest = np.argpartition(nearness, RANKED)[:RANKED]
            candidates, nearness = candidates[nearest], nearness[nearest]
        order = np.lexsort((candidates, nearness))
        return deque(UnitId(self.ids.first + int(i)) for i in candidates[order])
