"""planner.experts: how many experts a pass needs and misses, in expectation, and what that does to a pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipo.base.machine import StageWork, WeightWork
from pipo.base.tensor_type import TensorType
from pipo.planner.cost import PassLoad, StageCost, expert_bytes, expert_costs, step_costs
from pipo.planner.device_placement import DevicePlacement
from pipo.planner.expert_slots import ExpertClass
from pipo.planner.experts import ExpectedRouting, ExpertWork
from pipo.planner.placement import ChunkCost, Demand, UnitRole, UnitSize, place, smallest_bytes
from pipo.planner.predict import Placed, Shapes
from pipo.planner.residency import Need, Pool, Residency, UnitId
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import ExpertCosts, Lane, Line, StepCosts
from tests.support.machines import MACHINE
from tests.support.planned import HIDDEN_SIZE, WITH_GPU

WORK = StageWork((WeightWork(TensorType.Q4_0, 1_000_000),), 4096)
EXPERTS = ExpertWork(WORK, 562_500, None, 64, 8)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_tokens", [1, 4, 100])
def test_needed_is_what_drawing_needs(skew: float, num_tokens: int) -> None:
    """Each expert is drawn for a token with its share, as the estimate has it."""
    routing = ExpectedRouting(skew=skew)
    shares = np.asarray(routing._shares(EXPERTS))
    assert shares.sum() == pytest.approx(8) and shares.max() <= 1 and (np.diff(shares) <= 1e-12).all()
    drawn = np.random.default_rng(0).random((400, num_tokens, 64)) < shares
    assert routing.num_needed(EXPERTS, num_tokens) == pytest.approx(drawn.any(axis=1).sum(axis=1).mean(), rel=0.03)
    held = drawn[:, :, 16:].any(axis=1).sum(axis=1).mean()
    assert routing.num_missing(EXPERTS, num_tokens, 0.25) == pytest.approx(held, rel=0.05, abs=0.02)


def test_nothing_is_missing_where_all_fit() -> None:
    assert ExpectedRouting().num_missing(EXPERTS, 7, 1.0) == 0
    assert ExpectedRouting().num_missing(EXPERTS, 1, 0.0) == pytest.approx(8)


def test_a_recorded_run_is_taken_at_its_word() -> None:
    routing = ExpectedRouting("a run", misses=[(0.2, 0.5), (0.4, 0.1)])
    for held, rate in ((0.1, 0.5), (0.2, 0.5), (0.3, 0.3), (0.4, 0.1), (0.9, 0.1)):
        assert routing.num_missing(EXPERTS, 1, held) == pytest.approx(8 * rate)


def test_bytes_and_seconds_of_a_pass() -> None:
    stages = [StageCost(WORK, None), StageCost(StageWork((), 0), None, experts=EXPERTS)]
    routing = ExpectedRouting(misses=[(0.5, 0.25)], recall=0.75)
    assert expert_bytes(stages, PassLoad(), routing, 0.5) == 2 * 562_500
    costs = expert_costs(stages, MACHINE, PassLoad(), routing, 0.5)
    read = MACHINE.unit_read_s(562_500)
    assert costs[1].read_guessed == pytest.approx(1.5 * read) and costs[1].read_late == pytest.approx(0.5 * read)
    one_s = MACHINE.cpu.stage_s(WORK, 1) - MACHINE.cpu.stage_overhead_s
    assert costs[1].compute_missing == pytest.approx(2 * one_s)


def test_a_block_waits_for_what_is_missing_and_reads_ahead_meanwhile() -> None:
    """Two blocks by hand: 2 s of late reads beside 1 s of computing, then 0.5 s for those that came late."""
    needs = [Need(0, None), Need(1, None, is_routed=True), Need(2, None), Need(3, None, is_routed=True)]
    experts = ExpertCosts(read_guessed=3.0, read_late=2.0, compute_here=1.0, compute_missing=0.5)
    costs = StepCosts({}, {0: 1.0, 2: 1.0}, experts={1: experts, 3: experts})
    line = Line(needs, SCHEDULES["pipelined"], Residency(Pool({}, [], set())))
    line.run_pass(costs)
    ends = [span.end for span in line.simulator.spans if span.lane is Lane.CPU]
    # attention 0-1 · here 1-2, late read 1-3, missing 3-3.5 · guess for the next block 3-6 · attention 3.5-4.5
    # late read waits for the guess: 6-8 · here 4.5-5.5 · missing 8-8.5
    assert ends == pytest.approx([1, 2, 3.5, 4.5, 5.5, 8.5])


def test_attention_on_a_device_hands_over_to_experts_on_the_cpu_and_back() -> None:
    """Two blocks and a head by hand: 0.25 s down and 0.125 s up around each block's experts."""
    needs = [Need(0, None), Need(1, None, is_routed=True), Need(2, None), Need(3, None, is_routed=True), Need(4, None)]
    experts = ExpertCosts(read_guessed=0.0, read_late=0.0, compute_here=2.0, compute_missing=0.0)
    costs = StepCosts(
        {}, {0: 1.0, 2: 1.0, 4: 0.5}, on_device=frozenset({0, 2, 4}), handover=0.125, routing_handover=0.25,
        experts={1: experts, 3: experts},
    )  # fmt: skip
    line = Line(needs, SCHEDULES["pipelined"], Residency(Pool({}, [], set())))
    assert line.run_pass(costs) == pytest.approx(2 * (1 + 0.25 + 2 + 0.125) + 0.5)
    lanes = [span.lane for span in line.simulator.spans]
    assert lanes == [Lane.DEVICE, Lane.CPU, Lane.DEVICE, Lane.CPU, Lane.DEVICE]


def test_a_router_s_scores_and_what_experts_read_cross_the_link() -> None:
    stages = [StageCost(WORK, UnitId(0)), StageCost(StageWork((), 0), None, experts=EXPERTS)]
    costs = step_costs(stages, WITH_GPU, PassLoad(1, 4, 2), HIDDEN_SIZE, frozenset({0}))
    link = WITH_GPU.devices[1].to_host
    assert link is not None
    assert costs.routing_handover == pytest.approx(2 * link.seconds(16 * HIDDEN_SIZE) + 2 * link.seconds(16 * 64))
    shapes = Shapes([*stages, *(StageCost(WORK, UnitId(i)) for i in (1, 2))], HIDDEN_SIZE)
    there = DevicePlacement((True,) * 3, (True,) * 3, (0,) * 3, (), False, 0, 0, 0)
    ram = place(replace(demand(1 << 30), units=UNITS[:3]))
    assert Placed(shapes, WITH_GPU, ram, there).on_device == {0, 2, 3}, "all but the experts"


UNITS = [UnitSize(role, i, 1 << 20, 1 << 20) for i in range(4) for role in (UnitRole.ATTENTION,)]
CHUNKS = [ChunkCost(16, 1 << 18), ChunkCost(512, 8 << 20)]


def demand(limit_bytes: int) -> Demand:
    classes = (ExpertClass(100 << 10, 64, 4), ExpertClass(140 << 10, 32, 4))
    return Demand(UNITS, {"KV cache": 1 << 20}, CHUNKS, limit_bytes, experts=classes)


def test_experts_take_what_the_rest_leaves() -> None:
    smallest = smallest_bytes(demand(0))
    bare = place(demand(smallest))
    assert [each.num_slots for each in bare.expert_slots] == [4, 4] and bare.num_bytes == smallest
    last = 0
    for limit in range(smallest, smallest + (24 << 20), 200_000):
        placement = place(demand(limit))
        assert placement.num_bytes <= limit
        assert placement.num_expert_slots >= last, "more memory never holds fewer experts"
        last = placement.num_expert_slots if not placement.streamed_bytes else 0
        if not placement.streamed_bytes and placement.misses_experts:
            shares = [slots.num_slots / total for slots, total in zip(placement.expert_slots, (64, 32), strict=True)]
            assert abs(shares[0] - shares[1]) < 0.2
    assert not place(demand(1 << 30)).misses_experts and place(demand(1 << 30)).chunk.num_tokens == 512
    assert place(demand(1 << 30)).held_share == 1


def test_all_else_stays_before_more_experts_do() -> None:
    smallest = smallest_bytes(demand(0))
    roomier = place(demand(smallest + (4 << 20)))
    assert all(roomier.resident) and roomier.streamed_bytes == 0


def test_a_dense_model_has_no_slots_for_experts() -> None:
    placement = place(replace(demand(1 << 30), experts=()))
    assert not placement.expert_slots and placement.held_share == 1 and not placement.misses_experts
    assert "expert slots" not in placement.breakdown
    assert UnitId(0) == 0
