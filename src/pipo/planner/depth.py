"""How many slots a streaming placement gets: the fewest that simulation finds no avoidable stall with.

More slots let the drive run further ahead, and take memory from resident units, which then stream too. Neither rule of
thumb sees both, a simulated pass does. It does not see that no read takes as long as the last one, so where the pass is
as short, the slots that let the drive never wait are better: a 7B at a quarter of its size, one slot a class against
two, predicted 0.896 and 0.902 s, measured 0.95 and 0.91 s (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipo.planner.cost import PassLoad
from pipo.planner.placement import ENOUGH_IN_FLIGHT_BYTES, MAX_EXTRA_SLOTS, Demand, Placement, with_slots
from pipo.planner.predict import Placed
from pipo.planner.schedule import Schedule
from pipo.planner.simulate import Forecast

TOLERANCE = 1.01  # of the shortest pass: what other slots may cost, the simulator is no better than that
NO_STALL = 0.01  # of a pass: less is none

Simulate = Callable[[Placement], Forecast]


def best_depth(demand: Demand, placement: Placement, simulate: Simulate) -> Placement:
    """Of the placements whose pass is within 1 % of the shortest: the one that stalls least, then that with the fewest
    slots.

    Of those with the same limit and chunk that hold enough in flight. What all stays in RAM is returned as it is.
    Cost: `simulate` of MAX_EXTRA_SLOTS + 2 placements at most.
    """
    if not placement.streamed_bytes:
        return placement
    found = {placement.slots: (placement, simulate(placement))}
    for extra_slots in range(MAX_EXTRA_SLOTS, -1, -1):
        candidate = with_slots(demand, placement.chunk, extra_slots)
        if candidate is None or candidate.slots in found or not holds_enough(demand, candidate, placement):
            continue
        found[candidate.slots] = candidate, simulate(candidate)
    bound_s = TOLERANCE * min(forecast.seconds for _, forecast in found.values())
    alike = [(each, forecast) for each, forecast in found.values() if forecast.seconds <= bound_s]
    return min(alike, key=lambda pair: (max(pair[1].stall_share, NO_STALL), _depth(pair[0])))[0]


def holds_enough(demand: Demand, candidate: Placement, given: Placement) -> bool:
    """Twice what the drive should have in flight, as a finished read waits for its turn, or as much as the given one.

    The simulator knows no such wait: SmolLM2, units of 1 and 2 MB, 125 MB: 3 slots a class for 4 were predicted to be
    4 % faster and measured 6 % slower (five interleaved runs, busy cores).
    """
    wanted = 2 * min(demand.in_flight_bytes, ENOUGH_IN_FLIGHT_BYTES)
    return _in_flight_bytes(candidate) >= min(wanted, _in_flight_bytes(given))


def _in_flight_bytes(placement: Placement) -> int:
    """All slots but the one that is computed from can be on their way."""
    slots = [each for each in placement.slots if each.num_slots]
    return sum(each.num_bytes for each in slots) - max((each.slot_bytes for each in slots), default=0)


def _depth(placement: Placement) -> int:
    return sum(slots.num_slots for slots in placement.slots)


def simulated_pass(placed: Placed, demand: Demand, load: PassLoad, schedule: Schedule) -> Simulate:
    """A pass among many, of any placement of this demand.

    A drive that is asked for less at a time than `demand.in_flight_bytes` delivers that much less (Little's law).
    """
    wanted = min(demand.in_flight_bytes, ENOUGH_IN_FLIGHT_BYTES)

    def simulate(placement: Placement) -> Forecast:
        here = replace(placed, ram=placement).at(load.num_positions)
        costs = here.costs(load)
        slowdown = max(wanted / max(_in_flight_bytes(placement), 1), 1.0)
        read = {unit: seconds * slowdown for unit, seconds in costs.read.items()}
        return here.line(schedule).forecast(replace(costs, read=read))

    return simulate
