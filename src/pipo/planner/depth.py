"""How many slots a streaming placement gets: the fewest that simulation finds no avoidable stall with.

More slots let the drive run further ahead, and take memory from resident units, which then stream too. Neither rule of
thumb sees both, a simulated pass does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipo.planner.cost import PassLoad
from pipo.planner.placement import ENOUGH_IN_FLIGHT_BYTES, MAX_EXTRA_SLOTS, Demand, Placement, with_slots
from pipo.planner.predict import Placed
from pipo.planner.schedule import Schedule

TOLERANCE = 1.01  # of the shortest pass: what fewer slots may cost, since they leave memory to resident units

PassSeconds = Callable[[Placement], float]


def best_depth(demand: Demand, placement: Placement, pass_s: PassSeconds) -> Placement:
    """The placement with the fewest slots whose pass is within 1 % of the shortest, and no longer than the given one's.

    Of those with the same limit and chunk that hold enough in flight. What all stays in RAM is returned as it is.
    Cost: `pass_s` of MAX_EXTRA_SLOTS + 2 placements at most.
    """
    if not placement.streamed_bytes:
        return placement
    given_s = pass_s(placement)
    found = [(placement, given_s)]
    tried = {placement.slots: given_s}
    for extra_slots in range(MAX_EXTRA_SLOTS, -1, -1):
        candidate = with_slots(demand, placement.chunk, extra_slots)
        if candidate is None or candidate.slots in tried or not holds_enough(demand, candidate, placement):
            continue
        tried[candidate.slots] = pass_s(candidate)
        found.append((candidate, tried[candidate.slots]))
    bound_s = min(TOLERANCE * min(seconds for _, seconds in found), given_s)
    return min((each for each, seconds in found if seconds <= bound_s), key=_depth)


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


def simulated_pass_s(placed: Placed, demand: Demand, load: PassLoad, schedule: Schedule) -> PassSeconds:
    """Seconds of a pass among many, of any placement of this demand.

    A drive that is asked for less at a time than `demand.in_flight_bytes` delivers that much less (Little's law).
    """
    wanted = min(demand.in_flight_bytes, ENOUGH_IN_FLIGHT_BYTES)

    def pass_s(placement: Placement) -> float:
        here = replace(placed, ram=placement).at(load.num_positions)
        costs = here.costs(load)
        slowdown = max(wanted / max(_in_flight_bytes(placement), 1), 1.0)
        read = {unit: seconds * slowdown for unit, seconds in costs.read.items()}
        return here.line(schedule).forecast(replace(costs, read=read)).seconds

    return pass_s
