"""Whatever the model and the limit: a placement keeps the limit, or the refusal names the smallest that works."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.base.errors import OverBudget
from pipo.planner.placement import (
    ENOUGH_CHUNK_TOKENS,
    ChunkCost,
    Demand,
    KvPage,
    Placement,
    UnitRole,
    UnitSize,
    first_fitting,
    place,
    smallest_bytes,
)

PAGE = 4096


@st.composite
def demands(draw: st.DrawFn, *, num_chunks: int = 5, is_even: bool = False) -> Demand:
    """A model of a few blocks and a head. `is_even`: all blocks alike. The limit is still to be set."""
    num_blocks = draw(st.integers(1, 12))
    sizes = st.integers(1, 400) | st.integers(1, 400 * PAGE)
    attention, mlp = draw(sizes), draw(sizes)
    units = []
    for i in range(num_blocks):
        units += [
            _unit(UnitRole.ATTENTION, i, attention if is_even else draw(sizes)),
            _unit(UnitRole.MLP, i, mlp if is_even else draw(sizes)),
        ]
    head = draw(sizes)
    largest_mlp = max(u.place_bytes for u in units if u.role is UnitRole.MLP)
    piece = draw(st.integers(1, largest_mlp)) if head > largest_mlp else None
    units.append(_unit(UnitRole.HEAD, -1, head, piece))
    chunks = draw(st.lists(st.integers(0, 100 * PAGE), min_size=1, max_size=num_chunks))
    fixed = {"KV cache": draw(st.integers(0, 100 * PAGE)), "process": draw(st.integers(0, 100 * PAGE))}
    costs = [ChunkCost(16 << i, size) for i, size in enumerate(sorted(chunks))]
    in_flight = draw(st.just(0) | st.integers(0, 2000 * PAGE))
    page = KvPage(draw(st.integers(1, 300)), draw(st.integers(0, 20 * PAGE)))
    return Demand(units, fixed, costs, limit_bytes=0, in_flight_bytes=in_flight, kv_page=page)


def _unit(role: UnitRole, block_idx: int, place_bytes: int, piece: int | None = None) -> UnitSize:
    return UnitSize(role, block_idx, place_bytes, read_bytes=place_bytes, max_piece_bytes=piece)


def at(demand: Demand, limit_bytes: int) -> Demand:
    return replace(demand, limit_bytes=limit_bytes)


def whole_bytes(demand: Demand) -> int:
    """What everything takes, with the largest chunk."""
    weights = sum(-(-u.place_bytes // PAGE) * PAGE for u in demand.units)
    return weights + demand.chunks[-1].num_bytes + sum(demand.fixed.values())


def streamed_of(demand: Demand, placement: Placement, slot_class: int) -> list[UnitSize]:
    facts = zip(demand.units, placement.resident, placement.slot_class, strict=True)
    return [unit for unit, stays, own in facts if not stays and own == slot_class]


shares = st.integers(0, 1000)  # of the way from the smallest limit to more than everything takes


def limit_at(demand: Demand, share: int) -> int:
    low = smallest_bytes(demand)
    return low + max(whole_bytes(demand) - low, 0) * share // 800


@given(demands(), shares)
def test_the_limit_is_kept(demand: Demand, share: int) -> None:
    limit = limit_at(demand, share)
    placement = place(at(demand, limit))
    assert placement.num_bytes == sum(placement.breakdown.values()) <= limit


@given(demands())
def test_the_smallest_limit_works_and_one_byte_less_does_not(demand: Demand) -> None:
    smallest = smallest_bytes(demand)
    assert place(at(demand, smallest)).num_bytes <= smallest
    with pytest.raises(OverBudget) as refused:
        place(at(demand, smallest - 1))
    assert refused.value.smallest_bytes == smallest


@given(demands(), shares)
def test_smallest_bytes_does_not_depend_on_the_limit(demand: Demand, share: int) -> None:
    assert smallest_bytes(at(demand, limit_at(demand, share))) == smallest_bytes(demand)


@given(demands())
def test_all_is_resident_when_it_fits(demand: Demand) -> None:
    placement = place(at(demand, whole_bytes(demand)))
    assert all(placement.resident) and placement.streamed_bytes == 0
    assert sum(s.num_bytes for s in placement.slots) == 0
    assert placement.chunk == demand.chunks[-1]


@given(demands(), st.integers(0, 4))
def test_all_is_resident_where_a_chunk_of_64_tokens_fits_beside_it(demand: Demand, idx: int) -> None:
    chunk = demand.chunks[min(idx, len(demand.chunks) - 1)]
    placement = place(at(demand, whole_bytes(demand) - demand.chunks[-1].num_bytes + chunk.num_bytes))
    if chunk.num_tokens >= min(ENOUGH_CHUNK_TOKENS, demand.chunks[-1].num_tokens):
        assert all(placement.resident)
        assert placement.chunk.num_tokens >= chunk.num_tokens


@given(demands(), shares)
def test_a_resident_model_leaves_no_larger_chunk_that_fits(demand: Demand, share: int) -> None:
    limit = limit_at(demand, share)
    placement = place(at(demand, limit))
    if all(placement.resident):
        left = limit - placement.num_bytes + placement.chunk.num_bytes
        assert all(c.num_bytes > left for c in demand.chunks if c.num_tokens > placement.chunk.num_tokens)


@given(demands(), shares)
def test_counts_are_those_of_the_units(demand: Demand, share: int) -> None:
    placement = place(at(demand, limit_at(demand, share)))
    streamed = [u for u, stays in zip(demand.units, placement.resident, strict=True) if not stays]
    assert placement.streamed_bytes == sum(u.read_bytes for u in streamed)
    resident = [u.place_bytes for u in demand.units if u not in streamed]
    assert 0 <= placement.resident_bytes - sum(resident) < PAGE * max(len(demand.units), 1)
    assert placement.chunk in demand.chunks and placement.fixed == demand.fixed


@given(demands(), shares)
def test_slots_hold_every_streamed_unit_of_their_class(demand: Demand, share: int) -> None:
    placement = place(at(demand, limit_at(demand, share)))
    for i, slot_class in enumerate(placement.slots):
        streamed = streamed_of(demand, placement, i)
        assert all(unit.slot_bytes <= slot_class.slot_bytes for unit in streamed)
        assert bool(streamed) == (slot_class.num_slots > 0)


@given(demands(), shares)
def test_a_class_streams_more_units_than_it_has_slots(demand: Demand, share: int) -> None:
    """Else its slots could keep them for good."""
    placement = place(at(demand, limit_at(demand, share)))
    for i, slot_class in enumerate(placement.slots):
        streamed = streamed_of(demand, placement, i)
        assert not streamed or sum(unit.num_pieces for unit in streamed) > slot_class.num_slots


@given(demands(num_chunks=1, is_even=True), shares, shares)
def test_more_ram_streams_no_more_bytes(demand: Demand, share: int, other: int) -> None:
    """But for what second slots take, and for less than a block: blocks are spread first, then single units kept."""
    less, more = sorted((limit_at(demand, share), limit_at(demand, other)))
    before, after = place(at(demand, less)), place(at(demand, more))
    deeper = sum(slots.num_bytes for slots in after.slots if slots.num_slots > 1)
    block = sum(unit.slot_bytes for unit in demand.units[:2])
    assert after.streamed_bytes < before.streamed_bytes + deeper + block


@given(st.integers(1, 300), st.integers(0, 400))
def test_halving_finds_the_first_that_fits_in_few_attempts(num: int, first: int) -> None:
    """Where every later one fits too."""
    asked: list[int] = []

    def attempt(i: int) -> int | None:
        asked.append(i)
        return i if i >= first else None

    found = first_fitting(attempt, num)
    assert found == (first if first < num else None)
    assert len(asked) <= (num.bit_length() + 2 if first < num else num)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_whatever_fits_in_between_is_found(fits: list[bool]) -> None:
    found = first_fitting(lambda i: i if fits[i] else None, len(fits))
    assert (found is not None) == any(fits)
    assert found is None or fits[found]


@given(demands(), shares, st.lists(st.integers(1, 3000), min_size=2, max_size=6).map(sorted))
def test_a_longer_context_leaves_fewer_borrowers_and_the_limit_is_kept(
    demand: Demand, share: int, lengths: list[int]
) -> None:
    limit = limit_at(demand, share)
    placement = place(at(demand, limit))
    found = [placement.at(length) for length in lengths]
    for then in found:
        assert then.num_bytes <= placement.num_bytes <= limit
        streamed = [u for u, stays in zip(demand.units, then.resident, strict=True) if not stays]
        assert then.streamed_bytes == sum(u.read_bytes for u in streamed)
    for before, after in pairwise(found):
        assert all(stays or not stayed for stayed, stays in zip(after.resident, before.resident, strict=True))
    full = -(-demand.fixed["KV cache"] // max(demand.kv_page.num_bytes, 1)) * demand.kv_page.num_tokens
    assert placement.at(full).resident == placement.resident


@given(demands(is_even=True), shares)
def test_borrowers_use_what_an_empty_context_leaves(demand: Demand, share: int) -> None:
    """All of it, but for what is less than one more unit; and each is a streamed unit of a block, named once."""
    placement = place(at(demand, limit_at(demand, share)))
    borrowed = [each.unit_idx for each in placement.borrowers]
    assert len(set(borrowed)) == len(borrowed)
    assert not any(placement.resident[i] or demand.units[i].block_idx < 0 for i in borrowed)
    others = [i for i, u in enumerate(demand.units) if not placement.resident[i] and u.block_idx >= 0]
    if demand.kv_page.num_bytes and len(borrowed) < len(others):
        spare = demand.fixed["KV cache"] - demand.kv_page.num_bytes - sum(b.place_bytes for b in placement.borrowers)
        assert spare < max(-(-demand.units[i].place_bytes // PAGE) * PAGE for i in others)
