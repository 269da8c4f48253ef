"""Slots sized by simulation: never slower than the rule of thumb, never over the limit, and few simulations."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.planner.depth import TOLERANCE, best_depth, holds_enough, simulated_pass_s
from pipo.planner.placement import MAX_EXTRA_SLOTS, Demand, Placement, place, smallest_bytes, with_slots
from pipo.planner.predict import Placed, Workload, decode_load
from pipo.planner.schedule import SCHEDULES
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


def pass_s(model: Sizes, demand: Demand, placement: Placement) -> Callable[[Placement], float]:
    return simulated_pass_s(Placed(shapes(model), WITH_GPU, placement), demand, LOAD, PIPELINED)


@given(sizes, st.floats(0, 1), st.integers(0, 32 * MIB))
@settings(max_examples=40, deadline=None)
def test_never_slower_than_the_rule_of_thumb_and_as_shallow_as_can_be(
    model: Sizes, share: float, in_flight: int
) -> None:
    demand, today = streaming(model, share, in_flight)
    seconds = pass_s(model, demand, today)
    found = best_depth(demand, today, seconds)
    assert found.num_bytes <= demand.limit_bytes and found.chunk == today.chunk
    assert seconds(found) <= seconds(today)
    if not today.streamed_bytes:
        assert found is today
        return
    tried = [with_slots(demand, today.chunk, n) for n in range(MAX_EXTRA_SLOTS + 1)]
    others = [today, *(each for each in tried if each is not None and holds_enough(demand, each, today))]
    assert holds_enough(demand, found, today)
    bound_s = min(TOLERANCE * min(map(seconds, others)), seconds(today))
    assert seconds(found) <= bound_s
    depth = sum(slots.num_slots for slots in found.slots)
    assert all(seconds(o) > bound_s for o in others if sum(slots.num_slots for slots in o.slots) < depth)


def test_a_hundred_blocks_take_few_simulations() -> None:
    model = Sizes(num_blocks=100)
    demand, today = streaming(model, 0.3, 8 * MIB)
    simulate, asked = pass_s(model, demand, today), []

    def counted(placement: Placement) -> float:
        asked.append(placement.slots)
        return simulate(placement)

    best_depth(demand, today, counted)
    assert 1 < len(asked) == len(set(asked)) <= MAX_EXTRA_SLOTS + 2


def test_a_drive_that_is_asked_for_little_is_slow() -> None:
    """Units of 100 KB: one slot a class cannot hold what a drive wants to be asked for at a time."""
    model = Sizes(num_blocks=40, attention=50_000, mlp=100_000, head=200_000)
    demand, today = streaming(model, 0.3, MIB)
    seconds = pass_s(model, demand, today)
    shallow = with_slots(demand, today.chunk, 0)
    assert shallow is not None and seconds(shallow) > 2 * seconds(today)
    assert sum(slots.num_slots for slots in best_depth(demand, today, seconds).slots) > 4


def test_large_units_leave_memory_to_residents() -> None:
    """Where the drive binds, a second slot of 24 MiB is worth less than what could stay in its place."""
    model = Sizes(num_blocks=20)
    demand, today = streaming(model, 0.6, 4 * MIB)
    found = best_depth(demand, today, pass_s(model, demand, today))
    assert [slots.num_slots for slots in found.slots] == [1, 1]
    assert found.streamed_bytes <= today.streamed_bytes
