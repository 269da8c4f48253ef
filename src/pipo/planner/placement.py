"""Who lives where: pure arithmetic from sizes and a limit to a placement, or the smallest limit that works.

A sweep over the blocks defeats any cache that evicts by age, so the resident set is fixed; the streamed blocks are
spread evenly between the resident ones, which keeps the drive busy while resident stages compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate
from math import ceil

from pipo.base.errors import OverBudget
from pipo.base.units import PAGE_BYTES, format_size, round_up
from pipo.planner.expert_slots import ExpertClass, ExpertSlots, share_out
from pipo.planner.fitting import first_fitting, spread

KV_CACHE = "KV cache"  # its name among what is fixed
EXPERTS = "expert slots"
CHUNK_SHARE = 8  # a prefill chunk may take this fraction of what is left, where weights stream for want of it
GOLDEN = (5**0.5 - 1) / 2
MAX_EXTRA_SLOTS = 15
# all weights stay in RAM sooner than a chunk of more tokens than this is taken: streaming is paid for every token of an
# answer, a smaller chunk only where a prompt is long. SmolLM2, 650 tokens on two busy cores: 1.5 s in chunks of 16,
# 1.3 s of 32 and of 64, 1.1 s of 128
ENOUGH_CHUNK_TOKENS = 64
ENOUGH_IN_FLIGHT_BYTES = 8 << 20  # of small units; drives gave 95 % of their rate with 4 MiB


class UnitRole(Enum):
    """Units of one role have about the same size and share a class of slots."""

    ATTENTION = "attention"
    MLP = "mlp"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class UnitSize:
    """A unit as the planner sees it. `place_bytes` is what it takes in RAM, `read_bytes` what is read for it.

    `max_piece_bytes` is set for a unit that may be cut when it is streamed: the largest piece.
    """

    role: UnitRole
    block_idx: int
    place_bytes: int
    read_bytes: int
    max_piece_bytes: int | None = None
    is_staged: bool = False  # it stays on a device: RAM is where it passes through, once

    @property
    def slot_bytes(self) -> int:
        return round_up(self.max_piece_bytes or self.place_bytes, PAGE_BYTES)

    @property
    def num_pieces(self) -> int:
        """That move one by one when it is streamed."""
        return -(-self.place_bytes // self.max_piece_bytes) if self.max_piece_bytes else 1


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """Memory that a prefill chunk of `num_tokens` takes: intermediates, scratch, inputs."""

    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SlotClass:
    slot_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        return self.slot_bytes * self.num_slots


@dataclass(frozen=True, slots=True)
class KvPage:
    """The unit of KV allocation: what so many positions more take in all caches together, and, up to so many pages, in
    those of layers that slide.
    """

    num_tokens: int = 1
    num_bytes: int = 0
    sliding_bytes: int = 0
    most_sliding: int = 0

    def bytes_at(self, num_positions: float) -> int:
        num_pages = ceil(num_positions / self.num_tokens)
        return num_pages * self.num_bytes + min(num_pages, self.most_sliding) * self.sliding_bytes


@dataclass(frozen=True, slots=True)
class Demand:
    """Everything a placement depends on. `fixed` names what is needed whatever is resident, in bytes.

    `in_flight_bytes` is what the drive must have been asked for at any time to deliver its rate; `kv_page` how the KV
    cache grows into what is fixed for it.
    """

    units: Sequence[UnitSize]
    fixed: Mapping[str, int]
    chunks: Sequence[ChunkCost]  # ascending
    limit_bytes: int
    in_flight_bytes: int = 0
    kv_page: KvPage = KvPage()
    experts: tuple[ExpertClass, ...] = ()


@dataclass(frozen=True, slots=True)
class Borrower:
    """A streamed unit that stays in RAM for as long as the KV cache has not grown into the memory it takes."""

    unit_idx: int
    place_bytes: int  # whole pages
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`resident[i]` says whether unit i stays in RAM; slots[slot_class[i]] holds it otherwise.

    That is what a full context leaves. Until then `borrowers` stay too, as many as fit, in this order.
    """

    resident: tuple[bool, ...]
    slot_class: tuple[int, ...]
    slots: tuple[SlotClass, ...]
    chunk: ChunkCost
    resident_bytes: int
    streamed_bytes: int  # read per pass
    fixed: Mapping[str, int]
    kv_page: KvPage = KvPage()
    borrowers: tuple[Borrower, ...] = ()
    expert_slots: tuple[ExpertSlots, ...] = ()
    num_experts: int = 0  # of all blocks

    @property
    def breakdown(self) -> dict[str, int]:
        slots = sum(s.num_bytes for s in self.slots)
        experts = {EXPERTS: sum(each.num_bytes for each in self.expert_slots)} if self.expert_slots else {}
        return {
            "resident weights": self.resident_bytes,
            "slots": slots,
            **experts,
            "activations": self.chunk.num_bytes,
            **self.fixed,
        }

    @property
    def num_expert_slots(self) -> int:
        return sum(each.num_slots for each in self.expert_slots)

    @property
    def held_share(self) -> float:
        """Of all routed experts, those that fit at once; 1 where there are none."""
        return self.num_expert_slots / self.num_experts if self.num_experts else 1.0

    @property
    def misses_experts(self) -> bool:
        return self.held_share < 1

    @property
    def is_streaming(self) -> bool:
        return self.streamed_bytes > 0 or self.misses_experts

    @property
    def num_bytes(self) -> int:
        return sum(self.breakdown.values())

    def staying(self, num_positions: float) -> tuple[Borrower, ...]:
        """The borrowers that a KV cache of so many positions leaves room for. More positions never leave more."""
        spare = self.fixed[KV_CACHE] - self._kv_bytes(num_positions) if self.borrowers else 0
        ends = accumulate(borrower.place_bytes for borrower in self.borrowers)
        return tuple(each for each, end in zip(self.borrowers, ends, strict=True) if end <= spare)

    def at(self, num_positions: float) -> Placement:
        """Who lives where while the KV cache holds so many positions of each sequence."""
        staying = self.staying(num_positions)
        if not staying:
            return self
        ours = {each.unit_idx for each in staying}
        return replace(
            self,
            resident=tuple(stays or i in ours for i, stays in enumerate(self.resident)),
            resident_bytes=self.resident_bytes + sum(each.place_bytes for each in staying),
            streamed_bytes=self.streamed_bytes - sum(each.read_bytes for each in staying),
            fixed={**self.fixed, KV_CACHE: self._kv_bytes(num_positions)},
            borrowers=(),
        )

    def _kv_bytes(self, num_positions: float) -> int:
        return min(self.kv_page.bytes_at(num_positions), self.fixed[KV_CACHE])


def place(demand: Demand) -> Placement:
    """The placement that streams least. Raises OverBudget naming the smallest limit that works.

    All weights stay in RAM where they fit beside a chunk of ENOUGH_CHUNK_TOKENS or more, the largest that fits. Else
    the order of claims on the budget: what is fixed; one slot per class, the smallest chunk and a token's experts in
    one block; a larger chunk, up to an eighth of what is left, because prefill reads the streamed weights once per
    chunk; more slots (see `_extra_slots`); resident units; should they all fit, a larger chunk, or more experts.
    """
    smallest = _smallest(demand)
    if demand.limit_bytes < smallest.num_bytes:
        raise _over_budget(demand, smallest)
    everything = _all_resident(demand)
    if everything and everything.chunk.num_tokens >= min(ENOUGH_CHUNK_TOKENS, demand.chunks[-1].num_tokens):
        return _with_experts(demand, everything)
    chunk = _largest_affordable_chunk(demand)
    best = with_slots(demand, chunk, extra_slots=0)
    assert best is not None, "the smallest placement fits"
    filled = with_slots(demand, chunk, _extra_slots(demand, best)) or best
    return _with_experts(demand, everything) if everything and not filled.streamed_bytes else filled


def _with_experts(demand: Demand, placement: Placement) -> Placement:
    """All memory that is left holds experts."""
    if not demand.experts:
        return placement
    return replace(placement, expert_slots=share_out(demand.experts, demand.limit_bytes - placement.num_bytes))


def _with_borrowers(demand: Demand, placement: Placement) -> Placement:
    """Streamed units that together fit what the KV cache takes when it is full; the head, which is cut, is not one.

    In the order of multiples of the golden ratio: however many stay, they lie evenly among the others.
    """
    streamed = [i for i, stays in enumerate(placement.resident) if not stays and _may_borrow(demand.units[i])]
    order = sorted(range(len(streamed)), key=lambda rank: (rank + 1) * GOLDEN % 1)
    units = [(streamed[rank], demand.units[streamed[rank]]) for rank in order]
    borrowers = [Borrower(i, round_up(unit.place_bytes, PAGE_BYTES), unit.read_bytes) for i, unit in units]
    first_page = demand.kv_page.bytes_at(1)
    room = demand.fixed.get(KV_CACHE, 0) - first_page if first_page else 0
    ends = accumulate(each.place_bytes for each in borrowers)
    fitting = tuple(each for each, end in zip(borrowers, ends, strict=True) if end <= room)
    return replace(placement, kv_page=demand.kv_page, borrowers=fitting)


def _may_borrow(unit: UnitSize) -> bool:
    return unit.block_idx >= 0 and not unit.is_staged


def _all_resident(demand: Demand) -> Placement | None:
    """With the largest chunk that fits; None where none does. Where experts go short of memory, it has its share."""
    all_experts = sum(each.most.num_bytes for each in demand.experts)
    for chunk in reversed(demand.chunks):
        placement = _with_residents(demand, chunk, [not u.is_staged for u in demand.units], extra_slots=0)
        left = demand.limit_bytes - placement.num_bytes
        is_small = chunk.num_bytes * CHUNK_SHARE <= left or chunk is demand.chunks[0]
        holds_experts = sum(each.num_bytes for each in placement.expert_slots) + left >= all_experts
        if left >= 0 and (is_small or holds_experts):
            return placement
    return None


def _extra_slots(demand: Demand, bare: Placement) -> int:
    """Slots per class beyond the first.

    Small units want several: while one is computed the others must hold all that the drive should have in flight,
    twice, since a finished read waits for its turn. They may take a quarter of what is not fixed. Large units hold
    enough in one slot; a second smooths the order of arrivals, and is taken where it costs a fiftieth of the limit.
    """
    per_class = sum(s.slot_bytes for s in bare.slots)
    if not per_class:
        return 0
    in_flight = min(demand.in_flight_bytes, ENOUGH_IN_FLIGHT_BYTES)
    wanted = -(-2 * in_flight // per_class) - 1
    free_bytes = demand.limit_bytes - sum(demand.fixed.values()) - bare.chunk.num_bytes
    affordable = free_bytes // 4 // per_class - 1
    cheap = 1 if per_class * 50 <= demand.limit_bytes else 0
    return max(min(wanted, affordable, MAX_EXTRA_SLOTS), cheap, 0)


def smallest_bytes(demand: Demand) -> int:
    """The smallest limit that `place` accepts for this demand."""
    return _smallest(demand).num_bytes


def _smallest(demand: Demand) -> Placement:
    streamed = _with_residents(demand, demand.chunks[0], [False] * len(demand.units), extra_slots=0)
    resident = _with_residents(demand, demand.chunks[0], [not u.is_staged for u in demand.units], extra_slots=0)
    return min(streamed, resident, key=lambda placement: placement.num_bytes)


def _largest_affordable_chunk(demand: Demand) -> ChunkCost:
    bare = _with_residents(demand, demand.chunks[0], [False] * len(demand.units), extra_slots=0).num_bytes
    bare -= demand.chunks[0].num_bytes
    left = demand.limit_bytes - bare
    affordable = [c for c in demand.chunks if c.num_bytes <= left // CHUNK_SHARE]
    return affordable[-1] if affordable else demand.chunks[0]


def with_slots(demand: Demand, chunk: ChunkCost, extra_slots: int) -> Placement | None:
    """Stream as few evenly spread blocks as fit, then keep single units for what is left. None: so many slots do not
    fit.
    """
    blocks = sorted({u.block_idx for u in demand.units if u.block_idx >= 0 and not u.is_staged})
    best: Placement | None = None
    for head_resident in (True, False):

        def streaming(num_streamed: int, head_resident: bool = head_resident) -> Placement | None:
            streamed = spread(blocks, num_streamed)
            resident = [
                not u.is_staged and (u.block_idx not in streamed if u.block_idx >= 0 else head_resident)
                for u in demand.units
            ]
            candidate = _with_residents(demand, chunk, resident, extra_slots)
            return candidate if candidate.num_bytes <= demand.limit_bytes else None

        candidate = first_fitting(streaming, len(blocks) + 1)
        if candidate is not None:
            candidate = _keep_more(demand, candidate, extra_slots)
            if best is None or candidate.streamed_bytes < best.streamed_bytes:
                best = candidate
    return best and _with_experts(demand, _with_borrowers(demand, best))


def _keep_more(demand: Demand, placement: Placement, extra_slots: int) -> Placement:
    """Make further single units resident while they fit, largest first."""
    order = sorted(range(len(demand.units)), key=lambda i: -demand.units[i].place_bytes)
    too_large: set[UnitSize] = set()  # one like them did not fit
    for i in order:
        alike = replace(demand.units[i], block_idx=-1)
        if placement.resident[i] or demand.units[i].is_staged or alike in too_large:
            continue
        resident = list(placement.resident)
        resident[i] = True
        candidate = _with_residents(demand, placement.chunk, resident, extra_slots)
        if candidate.num_bytes <= demand.limit_bytes and candidate.streamed_bytes < placement.streamed_bytes:
            placement = candidate
            too_large.clear()  # one unit less may want fewer or smaller slots
        else:
            too_large.add(alike)
    return placement


def _with_residents(demand: Demand, chunk: ChunkCost, resident: Sequence[bool], extra_slots: int) -> Placement:
    streamed = [u for u, stays in zip(demand.units, resident, strict=True) if not stays]
    attention = _class_of([u for u in streamed if u.role is UnitRole.ATTENTION], extra_slots)
    others = _class_of([u for u in streamed if u.role is not UnitRole.ATTENTION], extra_slots)
    slots = (attention, others)
    return Placement(
        resident=tuple(resident),
        slot_class=tuple(0 if u.role is UnitRole.ATTENTION else 1 for u in demand.units),
        slots=slots,
        chunk=chunk,
        resident_bytes=sum(
            round_up(u.place_bytes, PAGE_BYTES) for u, stays in zip(demand.units, resident, strict=True) if stays
        ),
        streamed_bytes=sum(u.read_bytes for u in streamed if not u.is_staged),
        fixed=demand.fixed,
        expert_slots=tuple(each.least for each in demand.experts),
        num_experts=sum(each.num_experts for each in demand.experts),
    )


def _class_of(units: Iterable[UnitSize], extra_slots: int) -> SlotClass:
    """Fewer slots than units that move through them: as many could hold them all for good."""
    streamed = list(units)
    if not streamed:
        return SlotClass(0, 0)
    num_moving = sum(u.num_pieces for u in streamed)
    return SlotClass(max(u.slot_bytes for u in streamed), min(1 + extra_slots, max(num_moving - 1, 1)))


def _over_budget(demand: Demand, smallest: Placement) -> OverBudget:
    parts = sorted(smallest.breakdown.items(), key=lambda part: -part[1])
    line = " · ".join(f"{name} {format_size(size)}" for name, size in parts if size)
    needed, limit = format_size(smallest.num_bytes), format_size(demand.limit_bytes)
    return OverBudget(
        f"needs {needed} of RAM at least, the limit is {limit}\n  {line}",
        smallest_bytes=smallest.num_bytes,
        hint=f"the smallest --ram that works is {smallest_ram_text(smallest.num_bytes)}",
    )


def smallest_ram_text(num_bytes: int) -> str:
    """A `--ram` argument that parses to at least `num_bytes`, to a tenth of a MiB."""
    tenths = -(-num_bytes * 10 // (1 << 20))
    return f"{tenths // 10}.{tenths % 10}MiB"
