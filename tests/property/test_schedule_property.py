"""Whatever the model, the slots and the passes before: every schedule reads what it computes, and holds its slots."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipo.planner.residency import Need, Pool, Residency, SlotId, Step, StepKind, UnitId
from pipo.planner.schedule import SCHEDULES
from tests.support.simulated_drive import SimulatedDrive

NOT_CUT = 1 << 30


@dataclass(frozen=True)
class Model:
    """`body` and `head` are the needs of a pass with outputs, in order; without outputs only the body is computed."""

    body: tuple[Need, ...]
    head: tuple[Need, ...]
    classes: Mapping[UnitId, int]  # of the streamed units
    num_slots: tuple[int, ...]

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.body + self.head

    @property
    def units(self) -> list[UnitId]:
        return _units(self.needs)

    @property
    def unit_of_stage(self) -> dict[int, UnitId]:
        return {need.stage_idx: need.unit_id for need in self.needs if need.unit_id is not None}

    def start(self) -> Residency:
        """Before the first pass: nothing is in RAM."""
        free, first = [], 0
        for num in self.num_slots:
            free.append(deque(SlotId(first + i) for i in range(num)))
            first += num
        return Residency(Pool(self.classes, free, {u for u in self.units if u not in self.classes}))


@dataclass(frozen=True)
class Pass:
    """`num_done` steps of its list happen; then it is cancelled."""

    has_outputs: bool
    num_done: int = NOT_CUT


def _units(needs: Sequence[Need]) -> list[UnitId]:
    return [need.unit_id for need in needs if need.unit_id is not None]


@st.composite
def models(draw: st.DrawFn) -> Model:
    """The first stage has a unit, as in every model there is."""
    num_classes = draw(st.integers(1, 3))
    units = st.sampled_from(["resident", *range(num_classes)])  # the numbers are slot classes
    kinds = st.just("no unit") | units
    body, head = [draw(units), *draw(st.lists(kinds, max_size=11))], draw(st.lists(kinds, max_size=5))
    needs: list[Need] = []
    classes: dict[UnitId, int] = {}
    for kind in (*body, *head):
        unit = None if kind == "no unit" else UnitId(sum(need.unit_id is not None for need in needs))
        needs.append(Need(len(needs), unit))
        if unit is not None and isinstance(kind, int):
            classes[unit] = kind
    slots = draw(st.tuples(*[st.integers(1, 4)] * num_classes))
    return Model(tuple(needs[: len(body)]), tuple(needs[len(body) :]), classes, slots)


whole_passes = st.lists(st.builds(Pass, st.just(True) | st.booleans()), min_size=1, max_size=5)
passes = st.lists(st.builds(Pass, st.booleans(), st.integers(0, 60) | st.just(NOT_CUT)), min_size=1, max_size=6)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)

ONE_SLOT_EACH = Model(
    tuple(Need(i, UnitId(i)) for i in range(8)), (Need(8, None), Need(9, UnitId(8))),
    {UnitId(i): i % 2 for i in range(8)} | {UnitId(8): 1}, (1, 1),
)  # fmt: skip
ONLY_HEAD_STREAMS = Model(
    (Need(0, UnitId(0)),), tuple(Need(i, UnitId(i)) for i in (1, 2, 3)), {UnitId(i): 0 for i in (1, 2, 3)}, (1,)
)


def scheduled(model: Model, schedule: str, each: Pass, residency: Residency) -> list[Step]:
    """The steps of one pass. The residency given stays as it is: schedules work on a copy."""
    needs = model.needs if each.has_outputs else model.body
    return SCHEDULES[schedule](needs, model.units, residency.copy())


def run_all(model: Model, schedule: str, passes: Sequence[Pass]) -> list[tuple[Residency, list[Step]]]:
    """(residency before, steps) of every pass, each cut where it says, its steps applied as the executor does."""
    residency, done = model.start(), []
    for each in passes:
        steps = scheduled(model, schedule, each, residency)
        done.append((residency.copy(), steps))
        apply_all(steps[: each.num_done], residency)
    return done


def apply_all(steps: Sequence[Step], residency: Residency) -> None:
    for step in steps:
        if step.kind in (StepKind.READ, StepKind.RELEASE):
            residency.apply(step)


def check_list(model: Model, needs: Sequence[Need], before: Residency, steps: Sequence[Step]) -> None:
    """Replays a list against rules of its own: slots with one owner, units in their place when computed."""
    owners = {slot: unit for unit, slot in before.ram.held.items()}
    there = {u for u in model.units if u not in model.classes} - before.ram.missing
    first_of_class = [sum(model.num_slots[:i]) for i in range(len(model.num_slots))]
    computed = []
    for step in steps:
        unit, slot = step.unit_id, step.slot_id
        if step.kind is StepKind.READ and unit in model.classes:
            begin = first_of_class[model.classes[unit]]
            assert begin <= slot < begin + model.num_slots[model.classes[unit]], "a slot of another class"
            assert slot not in owners, "a slot is overwritten while it is held"
            assert unit not in owners.values(), "a unit is read twice"
            owners[slot] = unit
        elif step.kind is StepKind.READ:
            assert slot == -1 and unit not in there, "a resident unit is read twice"
            there.add(unit)
        elif step.kind is StepKind.RELEASE:
            assert owners.pop(slot) == unit
        elif step.kind is StepKind.COMPUTE:
            computed.append(step.stage_idx)
            needed = model.unit_of_stage.get(step.stage_idx)
            assert needed is None or needed in there or needed in owners.values(), "computed before it was read"
    assert computed == [need.stage_idx for need in needs]


@schedules
@given(models(), passes)
@example(ONE_SLOT_EACH, [Pass(True, 17), Pass(True)])
@example(ONLY_HEAD_STREAMS, [Pass(True), Pass(False, 1), Pass(True)])
def test_every_pass_finds_its_units_in_place(schedule: str, model: Model, passes: list[Pass]) -> None:
    for each, (before, steps) in zip(passes, run_all(model, schedule, passes), strict=True):
        check_list(model, model.needs if each.has_outputs else model.body, before, steps)


@schedules
@given(models(), passes)
def test_residency_and_steps_agree(schedule: str, model: Model, passes: list[Pass]) -> None:
    """The copy a schedule worked on and the real one, step by step, end the same."""
    residency = model.start()
    for each in passes:
        ahead = residency.copy()
        needs = model.needs if each.has_outputs else model.body
        steps = SCHEDULES[schedule](needs, model.units, ahead)
        apply_all(steps, residency)
        assert residency == ahead
        assert residency.ram.num_slots == list(model.num_slots)
        assert sorted([*residency.ram.held.values(), *(s for free in residency.ram.free for s in free)]) == list(
            range(sum(model.num_slots))
        )


@schedules
@given(models(), passes)
def test_every_read_is_computed_released_or_kept(schedule: str, model: Model, passes: list[Pass]) -> None:
    """Of a streamed unit: after its READ comes its RELEASE, or it is held when the list ends."""
    for before, steps in run_all(model, schedule, passes):
        reads = Counter(s.unit_id for s in steps if s.kind is StepKind.READ and s.unit_id in model.classes)
        releases = Counter(s.unit_id for s in steps if s.kind is StepKind.RELEASE)
        after = before.copy()
        apply_all(steps, after)
        for unit in model.classes:
            assert (unit in before.ram.held) + reads[unit] == releases[unit] + (unit in after.ram.held)


@schedules
@given(models(), passes, st.booleans())
@example(ONLY_HEAD_STREAMS, [Pass(True)], False)
def test_steady_state_reads_each_unit_once(schedule: str, model: Model, before: list[Pass], has_outputs: bool) -> None:
    """After two equal passes a third reads just what it computes, whatever happened before them."""
    *_, (_, steps) = run_all(model, schedule, [*before, *[Pass(has_outputs)] * 3])
    streamed = [u for u in _units(model.needs if has_outputs else model.body) if u in model.classes]
    assert sorted(s.unit_id for s in steps if s.kind is StepKind.READ) == sorted(streamed)


@given(models(), passes)
def test_pipelined_reads_as_far_ahead_as_slots_allow(model: Model, passes: list[Pass]) -> None:
    """Before every COMPUTE, the next unit in the order of need has no free slot, or is still to be computed itself."""
    for each, (before, steps) in zip(passes, run_all(model, "pipelined", passes), strict=True):
        needs = model.needs if each.has_outputs else model.body
        state, num_computed = before.copy(), 0
        for step in [*steps, Step(StepKind.COMPUTE)]:
            if step.kind is not StepKind.COMPUTE:
                apply_all([step], state)
                continue
            pending = _units(needs[num_computed:])
            following = [u for u in model.units if state.is_streamed(u)]
            # a unit that this pass still computes ends the look-ahead of the next: it will keep its slot
            stop = next((i for i, u in enumerate(following) if u in pending), len(following))
            unread = [u for u in [*pending, *following[:stop]] if state.wants_read(u)]
            assert not unread or not state.ram.has_place(unread[0])
            num_computed += 1


@given(models(), passes)
def test_pipelined_reads_in_the_order_of_need(model: Model, passes: list[Pass]) -> None:
    for each, (_, steps) in zip(passes, run_all(model, "pipelined", passes), strict=True):
        order = _units(model.needs if each.has_outputs else model.body)
        order += [u for u in model.units if u in model.classes]
        reads = iter(order)
        for step in steps:
            assert step.kind is not StepKind.READ or step.unit_id in reads  # consumes: a subsequence


@given(models(), passes)
def test_layer_looks_one_unit_ahead_and_waits_for_all(model: Model, passes: list[Pass]) -> None:
    for each, (before, steps) in zip(passes, run_all(model, "layer", passes), strict=True):
        for step, after in pairwise(steps):
            assert step.kind is not StepKind.COMPUTE or after.kind is StepKind.BARRIER
        needs = model.needs if each.has_outputs else model.body
        state = before.copy()
        unread_at_compute: list[set[UnitId]] = []
        for step in steps:
            apply_all([step], state)
            if step.kind is StepKind.COMPUTE:
                own = model.unit_of_stage.get(step.stage_idx)
                assert len(set(state.ram.held) - {own}) <= 1, "more than one unit ahead"
                unread_at_compute.append(set(state.ram.missing))
        for i, unread in enumerate(unread_at_compute):
            later = _units(needs[i + 2 :])
            assert {u for u in later if u in before.ram.missing} <= unread, "a resident unit two layers ahead"


@given(models(), passes)
def test_sequential_holds_one_unit_at_a_time(model: Model, passes: list[Pass]) -> None:
    for before, steps in run_all(model, "sequential", passes):
        state, reads = before.copy(), 0
        for step in steps:
            apply_all([step], state)
            reads += step.kind is StepKind.READ
            if step.kind is StepKind.COMPUTE:
                assert reads <= 1 and set(state.ram.held) <= {model.unit_of_stage.get(step.stage_idx)}
                reads = 0


@given(models(), whole_passes, st.integers(0, 1 << 32))
@settings(max_examples=300)
def test_pipelined_is_never_slower_than_layer_nor_layer_than_sequential(
    model: Model, passes: list[Pass], seed: int
) -> None:
    """On one drive that serves reads in turn, until the last stage is computed.

    A pass expects the next one to have outputs. Before each that has none, head units may have been read too early,
    each once: it then stays until it is computed.
    """
    rng = random.Random(seed)
    read_s = {unit: rng.choice([0.0, rng.random(), 10 * rng.random()]) for unit in model.units}
    compute_s = {need.stage_idx: rng.choice([0.0, rng.random(), 10 * rng.random()]) for need in model.needs}
    seconds = {}
    for schedule in SCHEDULES:
        drive = SimulatedDrive(read_s, compute_s)
        for _, steps in run_all(model, schedule, passes):
            drive.run(steps, model.unit_of_stage)
        seconds[schedule] = drive.finished_s
    floor_s = sum(compute_s[n.stage_idx] for each in passes for n in (model.needs if each.has_outputs else model.body))
    num_surprises = sum(not each.has_outputs for each in passes)
    early_s = num_surprises * sum(read_s[u] for u in _units(model.head) if u in model.classes)
    slack = 1e-9 * (1 + seconds["sequential"])
    assert floor_s <= seconds["pipelined"] + slack, f"{seed=}"
    assert seconds["pipelined"] <= seconds["layer"] + early_s + slack, f"{seed=} {seconds}"
    assert seconds["layer"] <= seconds["sequential"] + slack, f"{seed=} {seconds}"
