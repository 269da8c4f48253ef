"""tiers.ram: private, page-aligned, charged, and given back to the kernel at once."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from pipo.base.errors import OverBudget
from pipo.base.units import MIB, PAGE_BYTES
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import HUGE_PAGE_BYTES, Arena, GrowingMemory, SlotPool

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


def num_present_pages(start: int, end: int) -> int:
    """Pages of these addresses that the kernel has given memory to. Source: its admin-guide/mm/pagemap.rst."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(start // PAGE_BYTES * 8)
        entries = np.frombuffer(pagemap.read((end - start) // PAGE_BYTES * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum())


def test_places_are_page_aligned_apart_and_zero() -> None:
    with Arena(20_000, name="slots", ledger=Ledger(MIB)) as arena:
        places = [arena.take(size) for size in (1, 4096, 4097)]
        assert [p.num_bytes for p in places] == [1, 4096, 4097] == [len(p.view) for p in places]
        assert all(p.address % 4096 == 0 for p in places)
        assert [p.address - places[0].address for p in places] == [0, 4096, 8192]
        assert not any(any(p.view) for p in places)


@LINUX
@pytest.mark.parametrize("size", [2 * MIB, 5 * MIB + 4096])
def test_large_memory_begins_on_a_huge_page_and_keeps_to_its_size(size: int) -> None:
    with Arena(size, name="slots", ledger=Ledger(size)) as arena:
        place = arena.take(size)
        assert place.address % HUGE_PAGE_BYTES == 0
        place.view[:] = bytes([1]) * size
        end = place.address + size
        mapping_end = place.address - arena._start + len(arena._map)
        assert num_present_pages(place.address, end) == size // PAGE_BYTES
        assert num_present_pages(end, mapping_end) == 0, "a page beyond the end"


def test_view_and_address_are_the_same_memory() -> None:
    with Arena(8192, name="slots", ledger=Ledger(MIB)) as arena:
        place = arena.take(8192)
        place.view[5000:5004] = b"pipo"
        assert ctypes.string_at(place.address + 5000, 4) == b"pipo"


def test_charged_in_pages_and_given_back() -> None:
    ledger = Ledger(MIB)
    arena = Arena(5000, name="norms", ledger=ledger)
    assert ledger.breakdown() == {"norms": 8192}
    arena.close()
    arena.close()
    assert ledger.in_use_bytes == 0


def test_refused_beyond_the_limit() -> None:
    with pytest.raises(OverBudget):
        Arena(MIB + 1, name="slots", ledger=Ledger(MIB))


def test_taking_more_than_there_is_is_our_bug() -> None:
    with Arena(4096, name="slots", ledger=Ledger(MIB)) as arena:
        arena.take(1)
        with pytest.raises(AssertionError):
            arena.take(1)


@LINUX
def test_memory_is_anonymous_not_shared_and_leaves_with_close() -> None:
    size = 64 * MIB
    anonymous, shared = status_kib("RssAnon"), status_kib("RssShmem")
    arena = Arena(size, name="slots", ledger=Ledger(size))
    np.frombuffer(arena.take(size).view, np.uint8)[:] = 1
    assert status_kib("RssAnon") - anonymous > 60 * 1024 and status_kib("RssShmem") == shared
    arena.close()
    assert status_kib("RssAnon") - anonymous < 8 * 1024


@LINUX
def test_a_view_that_outlives_its_arena_is_harmless() -> None:
    ledger = Ledger(64 * MIB)
    before = status_kib("RssAnon")
    arena = Arena(64 * MIB, name="slots", ledger=ledger)
    array = np.frombuffer(arena.take(64 * MIB).view, np.uint8)
    array[:] = 1
    arena.close()
    assert ledger.in_use_bytes == 0 and status_kib("RssAnon") - before < 8 * 1024
    array[12345] = 7
    assert array[0] == 0 and array[12345] == 7


def test_slot_pool_gives_each_slot_its_size() -> None:
    ledger = Ledger(MIB)
    with SlotPool([5000, 100, 4096], name="slots", ledger=ledger) as pool:
        assert [p.num_bytes for p in pool.places] == [5000, 100, 4096]
        for i, place in enumerate(pool.places):
            place.view[:] = bytes([i + 1]) * place.num_bytes
        assert [{*p.view} for p in pool.places] == [{1}, {2}, {3}]
        assert ledger.in_use_bytes == 8192 + 4096 + 4096
    assert ledger.in_use_bytes == 0


def test_growing_memory_is_charged_as_it_is_used() -> None:
    ledger = Ledger(3 * PAGE_BYTES)
    with GrowingMemory(MIB, name="KV cache", ledger=ledger) as memory:
        assert ledger.in_use_bytes == 0 and memory.place.num_bytes == MIB and memory.place.address % PAGE_BYTES == 0
        memory.charge(2 * PAGE_BYTES)
        with pytest.raises(OverBudget):
            memory.charge(4 * PAGE_BYTES)
        assert ledger.breakdown() == {"KV cache": 2 * PAGE_BYTES}
    assert ledger.in_use_bytes == 0


@LINUX
def test_growing_memory_takes_no_page_that_was_not_touched_and_gives_dropped_ones_back() -> None:
    with GrowingMemory(8 * MIB, name="KV cache", ledger=Ledger(MIB)) as memory:
        address, view = memory.place.address, memory.place.view
        view[: 10 * PAGE_BYTES] = bytes([1]) * (10 * PAGE_BYTES)
        assert num_present_pages(address, address + 8 * MIB) == 10, "a huge page came along"
        memory.drop(2 * PAGE_BYTES, 8 * MIB - 2 * PAGE_BYTES)
        assert num_present_pages(address, address + 8 * MIB) == 2
        assert not any(view[2 * PAGE_BYTES : 11 * PAGE_BYTES]) and all(view[: 2 * PAGE_BYTES])
