"""pipeline.expert_cache: whose slot the next expert takes."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from pipo.pipeline.expert_cache import ExpertCache, ExpertIds
from pipo.planner.residency import SlotId, UnitId

BLOCKS, EXPERTS = 3, 4
IDS = ExpertIds(10, BLOCKS, EXPERTS)


def make_cache(num_slots: int, half_life: float = 64.0) -> ExpertCache:
    return ExpertCache(IDS, [0] * BLOCKS, [deque(map(SlotId, range(100, 100 + num_slots)))], half_life)


def hold(cache: ExpertCache, *units: UnitId) -> None:
    for unit in units:
        slot = cache.slot_for(unit)
        assert slot is not None
        cache.take(unit, slot)


def leaving(cache: ExpertCache, unit: UnitId, at_block: int) -> list[UnitId]:
    """All that may go for `unit`, one after another."""
    found = []
    while (goes := cache.first_to_go(unit, at_block)) is not None:
        cache.give_back(goes)
        found.append(goes)
    return found


def used(**tokens: int) -> np.ndarray:
    """`b0e1=3`: three tokens passed expert 1 of block 0."""
    counts = np.zeros((BLOCKS, EXPERTS), np.int64)
    for name, count in tokens.items():
        counts[int(name[1]), int(name[3])] = count
    return counts


def test_ids_come_after_all_others() -> None:
    assert IDS.unit(2, 3) == 21 and IDS.split(UnitId(21)) == (2, 3)
    cache = make_cache(1)
    assert cache.owns(UnitId(10)) and not cache.owns(UnitId(9))


def test_the_least_wanted_goes_first() -> None:
    cache = make_cache(3)
    a, b, c = IDS.units(0, [0, 1, 2])
    hold(cache, a, b, c)
    cache.note(used(b0e0=5, b0e1=1, b0e2=3), 8)
    assert cache.slot_for(IDS.unit(0, 3)) is None
    assert leaving(cache, IDS.unit(0, 3), 0) == [b, c, a]


def test_of_equally_wanted_ones_the_block_that_comes_last() -> None:
    cache = make_cache(3)
    hold(cache, *(IDS.unit(block, 0) for block in range(BLOCKS)))
    cache.note(used(b0e0=1, b1e0=1, b2e0=1), 1)
    assert leaving(cache, IDS.unit(0, 3), 1) == [IDS.unit(1, 0), IDS.unit(0, 0), IDS.unit(2, 0)]


def test_what_is_kept_does_not_go() -> None:
    cache = make_cache(2)
    a, b = IDS.units(0, [0, 1])
    hold(cache, a, b)
    cache.keep([a])
    assert leaving(cache, IDS.unit(1, 0), 0) == [b]
    cache.let_go([a, b])
    assert leaving(cache, IDS.unit(1, 0), 0) == [a]
    hold(cache, a, b)
    cache.keep([a, b])
    assert leaving(cache, IDS.unit(1, 0), 0) == []
    cache.let_all_go()
    assert sorted(leaving(cache, IDS.unit(1, 0), 0)) == [a, b]


@pytest.mark.parametrize(("half_life", "goes"), [(1.0, 0), (1e6, 1)])
def test_a_short_memory_follows_the_newest_a_long_one_the_most_frequent(half_life: float, goes: int) -> None:
    cache = make_cache(2, half_life)
    hold(cache, *IDS.units(0, [0, 1]))
    for _ in range(10):
        cache.note(used(b0e0=1), 1)
    for _ in range(4):
        cache.note(used(b0e1=1), 1)
    assert cache.first_to_go(IDS.unit(1, 0), 0) == IDS.unit(0, goes)


def test_slots_of_another_size_are_none() -> None:
    free = [deque([SlotId(0)]), deque([SlotId(1)])]
    cache = ExpertCache(IDS, [0, 1, 0], free)
    hold(cache, IDS.unit(0, 0))
    assert cache.slot_for(IDS.unit(2, 0)) is None and cache.slot_for(IDS.unit(1, 0)) == 1
    assert cache.first_to_go(IDS.unit(1, 0), 0) is None and cache.first_to_go(IDS.unit(2, 0), 0) == IDS.unit(0, 0)


def test_free_slots_are_filled_with_what_was_never_read() -> None:
    cache = make_cache(2)
    hold(cache, IDS.unit(0, 0))
    assert cache.never_read() == (IDS.unit(0, 1), 101)
    hold(cache, IDS.unit(0, 1))
    assert cache.never_read() is None
    cache.give_back(IDS.unit(0, 0))
    assert cache.never_read() is None, "what had to go is not read again for no reason"
