"""pipeline.expert_schedule: whatever is needed, guessed, here or on its way, everybody computes once, in a place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from pipo.pipeline.expert_cache import ExpertCache, ExpertIds
from pipo.pipeline.expert_schedule import ExpertSchedule, Visit
from pipo.pipeline.expert_stats import ExpertStats
from pipo.planner.residency import SlotId, Step, StepKind, UnitId

BLOCKS, EXPERTS = 4, 8
IDS = ExpertIds(5, BLOCKS, EXPERTS)

experts = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS)
passes = st.lists(st.tuples(experts, experts), min_size=BLOCKS, max_size=BLOCKS)  # of each block: needed, guessed


def whole(units: Sequence[UnitId]) -> Iterator[tuple[UnitId, ...]]:
    yield from (tuple(units),) if units else ()


class World:
    """The executor's part: applies each step, and decides what has arrived."""

    def __init__(self, num_slots: int, num_ahead: int, seed: int) -> None:
        self.cache = ExpertCache(IDS, [0] * BLOCKS, [deque(map(SlotId, range(num_slots)))])
        self.stats = ExpertStats.of(BLOCKS)
        self.schedule = ExpertSchedule(self.cache, num_ahead, self.stats)
        self.num_slots = num_slots
        self.arrived: set[UnitId] = set()
        self._random = __import__("random").Random(seed)

    def is_here(self, unit: UnitId) -> bool:
        if unit in self.cache.held and self._random.random() < 0.5:
            self.arrived.add(unit)
        return unit in self.cache.held and unit in self.arrived

    def visit(self, visit: Visit) -> list[Step]:
        steps = []
        for step in self.schedule.steps(visit, self.is_here):
            steps.append(step)
            if step.kind in (StepKind.READ, StepKind.GUESS):
                assert step.unit_id not in self.cache.held
                self.cache.take(step.unit_id, step.slot_id)
                self.arrived.discard(step.unit_id)
            elif step.kind is StepKind.RELEASE or (step.kind is StepKind.DROP and self._random.random() < 0.5):
                self.cache.give_back(step.unit_id)
                self.arrived.discard(step.unit_id)
            elif step.kind is StepKind.EXPERTS:
                assert all(unit in self.cache.held for unit in step.units), "computed without a place"
                self.arrived.update(step.units)
            assert len(self.cache.held) <= self.num_slots
            assert len(set(self.cache.held.values())) == len(self.cache.held)
        return steps


@given(
    st.lists(passes, min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(),
    st.integers(0, 1000),
)  # fmt: skip
def test_every_expert_computes_once(
    runs: list[list[tuple[set[int], set[int]]]], num_slots: int, num_ahead: int, in_order: bool, is_one: bool, seed: int
) -> None:
    world = World(num_slots, num_ahead, seed)
    for run in runs:
        world.schedule.forget()
        for block, (needed, guessed) in enumerate(run):
            ahead = IDS.units(block + 1, sorted(guessed)) if block + 1 < BLOCKS else ()
            visit = Visit(
                block, block, IDS.units(block, sorted(needed)), ahead, whole, in_order, is_one and not in_order
            )
            steps = world.visit(visit)
            computed = [unit for step in steps if step.kind is StepKind.EXPERTS for unit in step.units]
            assert sorted(computed) == list(visit.needed), f"{seed=}"
            if in_order:
                assert computed == list(visit.needed)
            groups = [step for step in steps if step.kind is StepKind.EXPERTS]
            is_summed = groups[-1].units == ()
            assert is_summed is (not in_order and not (visit.at_once and len(groups) == 1))
            reads = [step for step in steps if step.kind is StepKind.READ]
            assert all(step.unit_id in visit.needed for step in reads)
            first_guess = next((i for i, s in enumerate(steps) if s.kind is StepKind.GUESS), len(steps))
            assert all(step.kind is not StepKind.READ for step in steps[first_guess:]), "a guess goes before a need"
    total = world.stats.total
    assert total.num_needed == sum(len(needed) for run in runs for needed, _ in run)
    assert min(total.num_hits, total.num_missed, total.num_guessed) >= 0


@given(st.lists(passes, min_size=1, max_size=3), st.integers(0, 100))
def test_with_room_for_all_nothing_has_to_go(runs: list[list[tuple[set[int], set[int]]]], seed: int) -> None:
    world = World(BLOCKS * EXPERTS, 4, seed)
    for run in runs:
        world.schedule.forget()
        for block, (needed, _) in enumerate(run):
            visit = Visit(block, block, IDS.units(block, sorted(needed)), (), whole, False, False)
            assert not [step for step in world.visit(visit) if step.kind is StepKind.RELEASE]
