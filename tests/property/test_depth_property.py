"""Slots sized by simulation: as fast as any, never over the limit, without avoidable stalls, few simulations."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.planner.depth import NO_STALL, TOLERANCE, Simulate, best_depth, holds_enough, simulated_pass
from pipo.planner.placement import MAX_EXTRA_SLOTS, Demand, Placement, place, smallest_bytes, with_slots
from pipo.planner.predict import Placed, Workload, decode_load
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Forecast, Lane
from tests.support.planned import MIB, WITH_GPU, Sizes, ram_demand, shapes

PIPELINED = SCHEDULES["pipelined"]
LOAD = decode_load(Workload(100, 100))
sizes = st.builds(
    Sizes,
    num_blocks=st.integers(1, 10),
    attention=st.integers(1, 16 * MIB),
    mlp=st.integers(1, 48 * MIB),
    head=st.integers(1, 64 * MIB),
)


def streaming(model: Sizes, share: float, in_flight: int) -> tuple[Demand, Placement]:
    """At a limit between the smallest and all there is."""
    low = smallest_bytes(ram_demand(model, 0))
    weights = sum(size for _, _, size in model.units)
    demand = ram_demand(model, low + int(weights * share), in_flight_bytes=in_flight)
    return demand, place(demand)


def simulated(model: Sizes, demand: Demand, placement: Placement) -> Simulate:
    return simulated_pass(Placed(shapes(model), WITH_GPU, placement), demand, LOAD, PIPELINED)


@given(sizes, st.floats(0, 1), st.integers(0, 32 * MIB))
@settings(max_examples=40, deadline=None)
def test_as_fast_as_any_and_as_shallow_as_can_be_without_a_stall(model: Sizes, share: float, in_flight: int) -> None:
    demand, today = streaming(model, share, in_flight)
    simulate = simulated(model, demand, today)
    found = best_depth(demand, today, simulate)
    assert found.num_bytes <= demand.limit_bytes and found.chunk == today.chunk
    if not today.streamed_bytes:
        assert found is today
        return
    tried = [with_slots(demand, today.chunk, n) for n in range(MAX_EXTRA_SLOTS + 1)]
    others = [today, *(each for each in tried if each is not None and holds_enough(demand, each, today))]
    assert holds_enough(demand, found, today)
    bound_s = TOLERANCE * min(simulate(each).seconds for each in others)
    assert simulate(found).seconds <= bound_s
    depth = sum(slots.num_slots for slots in found.slots)
    stall = max(simulate(found).stall_share, NO_STALL)
    for each in others:
        forecast = simulate(each)
        if forecast.seconds <= bound_s and sum(slots.num_slots for slots in each.slots) < depth:
            assert max(forecast.stall_share, NO_STALL) > stall


def test_a_hundred_blocks_take_few_simulations() -> None:
    model = Sizes(num_blocks=100)
    demand, today = streaming(model, 0.3, 8 * MIB)
    simulate, asked = simulated(model, demand, today), []

    def counted(placement: Placement) -> Forecast:
        asked.append(placement.slots)
        return simulate(placement)

    best_depth(demand, today, counted)
    assert 1 < len(asked) == len(set(asked)) <= MAX_EXTRA_SLOTS + 2


def test_a_drive_that_is_asked_for_little_is_slow() -> None:
    """Units of 100 KB: one slot a class cannot hold what a drive wants to be asked for at a time."""
    model = Sizes(num_blocks=40, attention=50_000, mlp=100_000, head=200_000)
    demand, today = streaming(model, 0.3, MIB)
    simulate = simulated(model, demand, today)
    shallow = with_slots(demand, today.chunk, 0)
    assert shallow is not None and simulate(shallow).seconds > 2 * simulate(today).seconds
    assert sum(slots.num_slots for slots in best_depth(demand, today, simulate).slots) > 4


def test_large_units_leave_memory_to_residents() -> None:
    """Where the drive binds, a second slot of 24 MiB is worth less than what could stay in its place."""
    model = Sizes(num_blocks=20)
    demand, today = streaming(model, 0.6, 4 * MIB)
    found = best_depth(demand, today, simulated(model, demand, today))
    assert [slots.num_slots for slots in found.slots] == [1, 1]
    assert found.streamed_bytes <= today.streamed_bytes


def test_a_slot_that_ends_a_stall_is_taken_where_the_pass_gets_no_longer() -> None:
    """One slot of a class lets the drive wait for what is computed from it; two are predicted to be as fast."""
    model = Sizes(num_blocks=60)
    demand, today = streaming(model, 0.2, 0)
    seconds = {1: (1.0, 0.03), 2: (1.009, 0.0), 3: (1.008, 0.0)}

    def simulate(placement: Placement) -> Forecast:
        whole_s, stall = seconds.get(placement.slots[1].num_slots, (2.0, 0.0))
        return Forecast(whole_s, {Lane.DRIVE: whole_s * (1 - stall)})

    assert [slots.num_slots for slots in best_depth(demand, today, simulate).slots] == [2, 2]
