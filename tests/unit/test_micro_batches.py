"""Passes cut by sequences: a device holds keys and values of a part of them at a time. What the planner says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.paper.cells import flexgen_laptop_job
from bench.paper.figures import Figures
from bench.paper.policy import KvHome
from bench.paper.predict import predict as predict_paper
from bench.paper.published import PIPO_CELLS
from pipo.base.machine import LinkProfile
from pipo.pipeline.spans import PassRows, Span
from pipo.planner.cost import PassLoad
from pipo.planner.device_placement import DeviceDemand, DevicePlacement, place_on_device
from pipo.planner.predict import Placed, Workload, decode_load, predict
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane
from tests.support.machines import GPU
from tests.support.planned import MIB, WITH_GPU, Sizes, device_demand, placed

SIZES, NUM = Sizes(kv_per_position=16384), 16
REQUEST = Workload(256, 256, NUM)
SLOW = replace(WITH_GPU, devices=(WITH_GPU.cpu, replace(GPU, from_host=LinkProfile(1e9))))
spans = st.lists(st.tuples(st.integers(0, 30), st.sampled_from((1, 1, 5))), min_size=1, max_size=31)


@given(spans, st.integers(1, 31))
def test_parts_have_every_token_once_and_in_order(drawn: list[tuple[int, int]], most: int) -> None:
    rows = PassRows.of([Span(sequence, 0, [sequence] * num, False) for sequence, num in dict(drawn).items()])
    parts = rows.parts(most)
    assert [token for part in parts for token in part.token_ids] == rows.token_ids
    for part in parts:
        sequences = [span.sequence for span in part.spans]
        assert part.first == min(sequences) and max(sequences) - part.first < most
        assert all(part.first <= group.first for group in part.groups)
        assert all(group.first + group.num_sequences - part.first <= most for group in part.groups)


def test_as_few_parts_as_fit() -> None:
    singles = [Span(i, 9, [7], True) for i in range(16)]
    chunk = Span(20, 0, [5, 6, 7], False)
    assert [part.num_tokens for part in PassRows.of([chunk, *singles]).parts(6)] == [6, 6, 4, 3]
    whole = PassRows.of(singles)
    assert whole.parts(16) == [whole] and PassRows.of([chunk]).parts(1) == [PassRows.of([chunk])]


def test_the_parts_of_a_load_are_those_of_the_pass() -> None:
    load = PassLoad(16, 1, 100)
    assert [part.num_sequences for part in load.parts(6)] == [6, 6, 4]
    assert load.parts(16) == load.parts(0) == (load,)
    mixed = replace(load, others=(PassLoad(2, 64, 32),))
    assert [(part.num_sequences, part.tokens_each) for part in mixed.parts(8)] == [(8, 1), (8, 1), (2, 64)]
    assert sum(part.num_tokens for part in mixed.parts(3)) == mixed.num_tokens


def without_parts(demand: DeviceDemand) -> DeviceDemand:
    """Keys and values of all sequences at a time or none."""
    return replace(demand, kv_bytes={NUM: demand.kv_bytes[NUM]})


def blocks_there(placement: DevicePlacement) -> int:
    return sum(placement.computes) // 2


def test_fewer_sequences_at_a_time_bring_more_blocks_to_the_device() -> None:
    """Two slots for all sequences are 256 MiB; the model is 272."""
    demand = device_demand(SIZES, 200 * MIB, num_sequences=NUM)
    before, found = list(place_on_device(without_parts(demand))), list(place_on_device(demand))
    assert max(map(blocks_there, before), default=0) < SIZES.num_blocks
    assert any(each.is_all for each in found)
    assert all(each.num_bytes <= demand.limit_bytes for each in found)
    assert {each.kv_sequences for each in found if each.is_all} <= set(range(1, NUM))


def test_with_room_for_all_nothing_is_cut() -> None:
    roomy = device_demand(SIZES, 1 << 40, num_sequences=NUM)
    assert {each.kv_sequences for each in place_on_device(roomy)} == {0, NUM}
    one = device_demand(SIZES, 100 * MIB)
    assert {each.kv_sequences for each in place_on_device(one)} <= {0, 1}


def in_parts(kv_sequences: int) -> Placed:
    """Every block passes through the device, and so do keys and values."""
    found = place_on_device(device_demand(SIZES, 1 << 40, num_sequences=NUM))
    streamed = sum(size for _, block, size in SIZES.units if block >= 0)
    whole = next(each for each in found if each.streamed_bytes == streamed and each.moves_kv)
    return placed(SIZES, 1 << 40, replace(whole, kv_sequences=kv_sequences), SLOW)


def test_a_sweep_is_shared_by_micro_batches() -> None:
    """Weights cross the link once for all; keys and values as if nothing were cut, but for a start each."""
    whole, parts = (predict(in_parts(num), REQUEST, SCHEDULES["pipelined"]) for num in (NUM, 4))
    assert parts.decode.busy[Lane.UPLOAD] == pytest.approx(whole.decode.busy[Lane.UPLOAD], rel=0.01)
    assert whole.tokens_per_s > parts.tokens_per_s > 0.9 * whole.tokens_per_s
    few = predict(in_parts(NUM), replace(REQUEST, num_sequences=4), SCHEDULES["pipelined"])
    assert parts.tokens_per_s > 1.2 * few.tokens_per_s


def test_micro_batches_overlap_within_a_stage() -> None:
    """Keys and values of the next one come while this one computes; one after another takes as long as the sum."""
    here = in_parts(2)
    found = {name: predict(here, REQUEST, SCHEDULES[name]).decode for name in SCHEDULES}
    costs = here.costs(decode_load(REQUEST))
    assert costs.num_micro_batches == 8
    assert found["pipelined"].seconds < found["layer"].seconds < found["sequential"].seconds
    assert found["pipelined"].share(Lane.UPLOAD) > 0.95


def test_flexgen_s_policy_gains_by_a_block_of_micro_batches() -> None:
    """The same micro-batch, one and eight to a sweep, where weights come from disk: much, and less than eightfold."""
    job = flexgen_laptop_job(next(cell for cell in PIPO_CELLS if cell.is_on_disk), Figures.load())
    one = replace(job, policy=replace(job.policy, kv=KvHome.RAM, num_micro_batches=1))
    eight = replace(one, policy=replace(one.policy, num_micro_batches=8))
    gain = predict_paper(eight, "layer").tokens_per_s / predict_paper(one, "layer").tokens_per_s
    assert 1.5 < gain < 8
