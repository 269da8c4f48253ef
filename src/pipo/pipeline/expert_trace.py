"""Which experts a run asked for, as a file of JSON lines, and how often a cache of some size and policy would miss.

The first line says what the model is; each other one is a visit of a block: its number among the blocks with experts,
and the experts of each token of the pass.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TextIO, TypeGuard

import numpy as np

from pipo.base.errors import MalformedTrace
from pipo.pipeline.expert_cache import HALF_LIFE_TOKENS, ExpertCache, ExpertIds
from pipo.pipeline.routing import Routing
from pipo.planner.experts import ExpectedRouting
from pipo.planner.residency import SlotId, UnitId

FORMAT = "pipo experts 1"
MAX_VISITS = 10_000_000
OURS = "pipo"
HALF_LIVES = (4, 8, 32, 64, 256)  # tokens


@dataclass(frozen=True, slots=True)
class TraceHead:
    """Of the model that was run."""

    model: str
    num_blocks: int
    num_experts: int  # of a block
    num_experts_per_tok: int


@dataclass(frozen=True, slots=True)
class BlockVisit:
    """Of a block in a pass: the experts of each of its tokens."""

    block: int
    experts: Sequence[Sequence[int]]

    @property
    def needed(self) -> list[int]:
        """Each once, ascending."""
        return sorted({expert for token in self.experts for expert in token})


@dataclass(frozen=True, slots=True)
class ExpertTrace:
    head: TraceHead
    visits: Sequence[BlockVisit]

    @property
    def num_needed(self) -> int:
        return sum(len(visit.needed) for visit in self.visits)

    def passes(self) -> Iterator[list[BlockVisit]]:
        """Visits of one pass; its blocks ascend."""
        numbers: list[int] = []
        for i, visit in enumerate(self.visits):
            begins = not i or visit.block <= self.visits[i - 1].block
            numbers.append(numbers[-1] + begins if numbers else 0)
        for _, pairs in groupby(zip(numbers, self.visits, strict=True), key=lambda pair: pair[0]):
            yield [visit for _, visit in pairs]


class TraceWriter:
    """Appends visits to a file as they happen. Close it."""

    def __init__(self, file: TextIO, head: TraceHead) -> None:
        self._file = file
        self._write({"format": FORMAT, **asdict(head)})

    def note(self, block: int, routing: Routing) -> None:
        self._write([block, np.asarray(routing.experts).tolist()])

    def _write(self, line: object) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


def read_trace(path: Path) -> ExpertTrace:
    """Raises MalformedTrace naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedTrace(f"cannot read {path}: {error}") from None
    if not lines or len(lines) > MAX_VISITS:
        raise MalformedTrace(f"{path}: {len(lines)} lines, wanted a head and up to {MAX_VISITS} visits")
    head = _head(path, lines[0])
    return ExpertTrace(head, [_visit(path, i, line, head) for i, line in enumerate(lines[1:], 2)])


def _parsed(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise MalformedTrace(f"{path}, line {number}: is not JSON: {line!r:.60}") from None


def _head(path: Path, line: str) -> TraceHead:
    found = _parsed(path, 1, line)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise MalformedTrace(f"{path}, line 1: wanted the head of a {FORMAT!r} file, found {line!r:.60}")
    named = [found.get(name) for name in ("num_blocks", "num_experts", "num_experts_per_tok")]
    counts = [count for count in named if type(count) is int and 0 < count <= 1 << 16]
    if len(counts) < 3 or counts[2] > counts[1]:
        raise MalformedTrace(f"{path}, line 1: wanted counts of blocks, experts and those of a token, found {named}")
    return TraceHead(str(found.get("model", "")), *counts)


def _visit(path: Path, number: int, line: str, head: TraceHead) -> BlockVisit:
    match _parsed(path, number, line):
        case [int(block), [*tokens]] if 0 <= block < head.num_blocks:
            experts = [token for token in tokens if _is_token(token, head)]
            if tokens and len(experts) == len(tokens):
                return BlockVisit(block, experts)
    raise MalformedTrace(
        f"{path}, line {number}: wanted [block below {head.num_blocks}, tokens of {head.num_experts_per_tok} experts "
        f"below {head.num_experts}], found {line!r:.60}"
    )


def _is_token(token: object, head: TraceHead) -> TypeGuard[list[int]]:
    if not isinstance(token, list) or len(token) != head.num_experts_per_tok:
        return False
    return all(type(expert) is int and 0 <= expert < head.num_experts for expert in token)


def policies(trace: ExpertTrace, num_slots: int) -> Iterator[tuple[str, int]]:
    """Misses by the name of the policy; the first is the least there can be, the second pipo's own."""
    yield "Belady", misses_of_belady(trace, num_slots)
    yield OURS, misses_of_cache(trace, num_slots, HALF_LIFE_TOKENS)
    yield "LRU", misses_of_lru(trace, num_slots)
    yield "LFU", misses_of_cache(trace, num_slots, 1e9)
    for half_life in HALF_LIVES:
        yield f"half-life {half_life:g}", misses_of_cache(trace, num_slots, half_life)


def routing_of(trace: ExpertTrace, source: str) -> ExpectedRouting:
    """For predictions: what pipo's cache would have missed with room for a tenth of the experts, two tenths, …

    Raises MalformedTrace for a trace without a pass of one token.
    """
    decode = ExpertTrace(trace.head, [visit for visit in trace.visits if len(visit.experts) == 1])
    if not decode.visits:
        raise MalformedTrace(f"{source}: has no pass of a single token, of which an answer is made")
    num_experts = trace.head.num_blocks * trace.head.num_experts
    shares = [tenths / 10 for tenths in range(1, 10)]
    slots = [max(int(share * num_experts), trace.head.num_experts_per_tok) for share in shares]
    rates = [misses_of_cache(decode, num, HALF_LIFE_TOKENS) / decode.num_needed for num in slots]
    return ExpectedRouting(f"recorded in {source}", misses=list(zip(shares, rates, strict=True)))


def misses_of_lru(trace: ExpertTrace, num_slots: int) -> int:
    """Whoever was not wanted for the longest time goes."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    num = 0
    for visit in trace.visits:
        for expert in visit.needed:
            key = visit.block, expert
            num += key not in held
            held[key] = None
            held.move_to_end(key)
        while len(held) > num_slots:
            held.popitem(last=False)
    return num


def misses_of_cache(trace: ExpertTrace, num_slots: int, half_life_tokens: float) -> int:
    """As ExpertCache chooses; with a half-life of very many tokens that is LFU."""
    head = trace.head
    ids = ExpertIds(0, head.num_blocks, head.num_experts)
    free = deque(map(SlotId, range(num_slots)))
    cache = ExpertCache(ids, [0] * head.num_blocks, [free], half_life_tokens)
    num = 0
    for visits in trace.passes():
        used = np.zeros((head.num_blocks, head.num_experts), np.int64)
        for visit in visits:
            needed = ids.units(visit.block, visit.needed)
            num += _bring(cache, needed, visit.block)
            np.add.at(used[visit.block], np.asarray(visit.experts).ravel(), 1)
        cache.note(used, len(visits[0].experts))
    return num


def _bring(cache: ExpertCache, needed: Sequence[UnitId], block: int) -> int:
    """How many were missing."""
    cache.keep(needed)
    missing = [unit for unit in needed if unit not in cache.held]
    for unit in missing:
        slot = cache.slot_for(unit)
        if slot is None:
            leaving = cache.first_to_go(unit, block)
            if leaving is None:  # more are needed at once than there are slots: one by one
                leaving = next(iter(cache.held))
            cache.give_back(leaving)
            slot = cache.slot_for(unit)
        assert slot is not None
        cache.take(unit, slot)
        cache.keep([unit])
    cache.let_go(needed)
    return len(missing)


def misses_of_belady(trace: ExpertTrace, num_slots: int) -> int:
    """The fewest that are possible: whoever is wanted again last goes, as nobody could know. Source: Belady 1966."""
    uses: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    for i, visit in enumerate(trace.visits):
        for expert in visit.needed:
            uses[visit.block, expert].append(i)
    next_use: dict[tuple[int, int], int] = {}
    farthest: list[tuple[int, tuple[int, int]]] = []  # a heap; entries that are not in `next_use` as they are, are old
    num = 0
    for visit in trace.visits:
        needed = [(visit.block, expert) for expert in visit.needed]
        num_missing = sum(key not in next_use for key in needed)
        num += num_missing
        # those that are needed now are used again soonest of all: they go last
        while len(next_use) > max(num_slots - num_missing, len(needed) - num_missing):
            when, key = heapq.heappop(farthest)
            if next_use.get(key) == -when:
                del next_use[key]
        for key in needed:
            uses[key].popleft()
            next_use[key] = uses[key][0] if uses[key] else len(trace.visits)
            heapq.heappush(farthest, (-next_use[key], key))
    return num
