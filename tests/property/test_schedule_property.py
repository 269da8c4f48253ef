"""Whatever the model, the slots and the passes before: every schedule reads what it computes, and holds its slots."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipo.planner.residency import Need, Pool, Residency, SlotId, Step, StepKind, Tier, UnitId
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane, Simulator, StepCosts

NOT_CUT = 1 << 30
Turn = tuple[int, int]  # a stage and a micro-batch


@dataclass(frozen=True)
class Model:
    """`body` and `head` are the needs of a pass with outputs, in order; without outputs only the body is computed."""

    body: tuple[Need, ...]
    head: tuple[Need, ...]
    classes: Mapping[UnitId, int]  # of the units that pass through RAM
    num_slots: tuple[int, ...]
    on_device: frozenset[UnitId] = frozenset()
    device_classes: Mapping[UnitId, int] = field(default_factory=dict)  # of those that pass through the device
    num_device_slots: tuple[int, ...] = ()

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
        ram = Pool(self.classes, _slots(self.num_slots), set(self.units) - self.classes.keys())
        device = Pool(
            self.device_classes, _slots(self.num_device_slots), set(self.on_device - self.device_classes.keys())
        )
        return Residency(ram, device, self.on_device)

    def moves(self, unit: UnitId, tier: Tier) -> bool:
        """In every pass, into this tier."""
        if tier is Tier.DEVICE:
            return unit in self.device_classes
        return unit in self.classes and (unit not in self.on_device or unit in self.device_classes)


@dataclass(frozen=True)
class Pass:
    """`num_done` steps of its list happen; then it is cancelled."""

    has_outputs: bool
    num_done: int = NOT_CUT


def _slots(counts: Sequence[int]) -> list[deque[SlotId]]:
    ids = iter(range(sum(counts)))
    return [deque(SlotId(next(ids)) for _ in range(num)) for num in counts]


def _units(needs: Sequence[Need]) -> list[UnitId]:
    return [need.unit_id for need in needs if need.unit_id is not None]


@st.composite
def models(draw: st.DrawFn, devices: st.SearchStrategy[bool] = st.just(False)) -> Model:  # noqa: B008
    """The first stage has a unit, as in every model there is. `devices`: whether a unit computes on one."""
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
    on_device = frozenset(n.unit_id for n in needs if n.unit_id is not None and draw(devices))
    device_classes = {u: draw(st.integers(0, num_classes - 1)) for u in on_device if draw(st.booleans())}
    return Model(
        tuple(
            need._replace(num_micro_batches=draw(devices) and draw(st.integers(1, 4))) for need in needs[: len(body)]
        ),
        tuple(needs[len(body) :]),
        classes,
        slots,
        on_device,
        device_classes,
        draw(st.tuples(*[st.integers(1, 3)] * num_classes)),
    )


def turns(needs: Sequence[Need]) -> list[Turn]:
    """All that a pass computes, in order: a stage whose keys and values move one micro-batch after another."""
    return [(need.stage_idx, i) for need in needs for i in range(max(need.num_micro_batches, 1))]


three_tiers = models(st.booleans())
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
        residency.apply(step)


class Replay:
    """Replays lists against rules of its own: slots with one owner, units in their place when used."""

    def __init__(self, model: Model, before: Residency) -> None:
        self.model = model
        self.owners = {tier: {s: u for u, s in before.pool(tier).held.items()} for tier in Tier}
        self.stays = {
            Tier.RAM: {u for u in model.units if u not in model.classes} - before.ram.missing,
            Tier.DEVICE: set(model.on_device) - set(model.device_classes) - before.device.missing,
        }
        self.computed: list[Turn] = []
        self.kv_loaded: list[Turn] = []

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.kind in (StepKind.READ, StepKind.COPY):
                tier = Tier.RAM if step.kind is StepKind.READ else Tier.DEVICE
                assert tier is Tier.RAM or self.is_there(step.unit_id, Tier.RAM), "copied before it was read"
                self.arrive(step, tier)
            elif step.kind is StepKind.RELEASE:
                assert self.owners[step.tier].pop(step.slot_id) == step.unit_id
            elif step.kind is StepKind.COMPUTE:
                self.compute(step)
            elif step.kind is StepKind.KV_LOAD:
                self.kv_loaded.append((step.stage_idx, step.micro_batch))
                assert len(self.kv_loaded) <= 2, "more keys and values on the device than there is room for"
            elif step.kind is StepKind.KV_SAVE:
                assert self.kv_loaded.pop(0) == self.computed[-1] == (step.stage_idx, step.micro_batch)

    def is_there(self, unit: UnitId, tier: Tier) -> bool:
        return unit in self.stays[tier] or unit in self.owners[tier].values()

    def arrive(self, step: Step, tier: Tier) -> None:
        model, unit, owners = self.model, step.unit_id, self.owners[tier]
        classes, counts = (
            (model.classes, model.num_slots) if tier is Tier.RAM else (model.device_classes, model.num_device_slots)
        )
        assert not self.is_there(unit, tier), "moved twice"
        if unit not in classes:
            assert step.slot_id == -1
            self.stays[tier].add(unit)
            return
        begin = sum(counts[: classes[unit]])
        assert begin <= step.slot_id < begin + counts[classes[unit]], "a slot of another class"
        assert step.slot_id not in owners, "a slot is overwritten while it is held"
        owners[step.slot_id] = unit

    def compute(self, step: Step) -> None:
        self.computed.append((step.stage_idx, step.micro_batch))
        unit = self.model.unit_of_stage.get(step.stage_idx)
        tier = Tier.DEVICE if unit in self.model.on_device else Tier.RAM
        assert unit is None or self.is_there(unit, tier), "computed before it was there"
        moves_kv = next(need.moves_kv for need in self.model.needs if need.stage_idx == step.stage_idx)
        assert not moves_kv or self.kv_loaded[0] == self.computed[-1], "computed before its keys and values came"


def check_list(model: Model, needs: Sequence[Need], before: Residency, steps: Sequence[Step]) -> None:
    replay = Replay(model, before)
    replay.run(steps)
    assert replay.computed == turns(needs)
    assert not replay.kv_loaded


@schedules
@given(three_tiers, passes)
@example(ONE_SLOT_EACH, [Pass(True, 17), Pass(True)])
@example(ONLY_HEAD_STREAMS, [Pass(True), Pass(False, 1), Pass(True)])
def test_every_pass_finds_its_units_in_place(schedule: str, model: Model, passes: list[Pass]) -> None:
    for each, (before, steps) in zip(passes, run_all(model, schedule, passes), strict=True):
        check_list(model, model.needs if each.has_outputs else model.body, before, steps)


@schedules
@given(three_tiers, passes)
def test_residency_and_steps_agree(schedule: str, model: Model, passes: list[Pass]) -> None:
    """The copy a schedule worked on and the real one, step by step, end the same."""
    residency = model.start()
    for each in passes:
        ahead = residency.copy()
        needs = model.needs if each.has_outputs else model.body
        steps = SCHEDULES[schedule](needs, model.units, ahead)
        apply_all(steps, residency)
        assert residency == ahead
        for pool, counts in ((residency.ram, model.num_slots), (residency.device, model.num_device_slots)):
            assert pool.num_slots == list(counts)
            assert sorted([*pool.held.values(), *(s for free in pool.free for s in free)]) == list(range(sum(counts)))


@schedules
@given(three_tiers, passes)
def test_every_transfer_is_released_or_kept(schedule: str, model: Model, passes: list[Pass]) -> None:
    """Of a unit in a slot: after its READ or COPY comes its RELEASE, or it is held when the list ends."""
    for before, steps in run_all(model, schedule, passes):
        after = before.copy()
        apply_all(steps, after)
        for tier, kind in ((Tier.RAM, StepKind.READ), (Tier.DEVICE, StepKind.COPY)):
            moves = Counter(s.unit_id for s in steps if s.kind is kind)
            releases = Counter(s.unit_id for s in steps if s.kind is StepKind.RELEASE and s.tier is tier)
            for unit in before.pool(tier).classes:
                held_before, held_after = unit in before.pool(tier).held, unit in after.pool(tier).held
                assert held_before + moves[unit] == releases[unit] + held_after


@schedules
@given(three_tiers, passes, st.booleans())
@example(ONLY_HEAD_STREAMS, [Pass(True)], False)
def test_steady_state_moves_each_unit_once(schedule: str, model: Model, before: list[Pass], has_outputs: bool) -> None:
    """After two equal passes a third moves just what it computes, whatever happened before them.

    With a device and no outputs, a head read ahead may stand in the way of every second pass.
    """
    assume(has_outputs or not model.on_device)
    *_, (_, steps) = run_all(model, schedule, [*before, *[Pass(has_outputs)] * 3])
    needed = _units(model.needs if has_outputs else model.body)
    for tier, kind in ((Tier.RAM, StepKind.READ), (Tier.DEVICE, StepKind.COPY)):
        moving = [u for u in needed if model.moves(u, tier)]
        assert sorted(s.unit_id for s in steps if s.kind is kind) == sorted(moving)


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


@given(three_tiers, passes)
def test_layer_saves_keys_and_values_while_the_next_layer_computes(model: Model, passes: list[Pass]) -> None:
    """Before the barrier of the next stage, so that neither waits for the other; the last one's before the end."""
    for _, steps in run_all(model, "layer", passes):
        order = [s for s in steps if s.kind in (StepKind.COMPUTE, StepKind.KV_SAVE, StepKind.BARRIER)]
        for i, step in enumerate(order):
            if step.kind is StepKind.KV_SAVE:
                after = [s.kind for s in order[i + 1 :][:2]]
                assert after in ([StepKind.COMPUTE, StepKind.BARRIER], [StepKind.BARRIER])
                assert order[i - 1].kind is StepKind.BARRIER


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


def random_seconds(rng: random.Random) -> float:
    return rng.choice([0.0, rng.random(), 10 * rng.random()])


def random_costs(model: Model, rng: random.Random) -> StepCosts:
    stages = [need.stage_idx for need in model.needs]
    return StepCosts(
        read={unit: random_seconds(rng) for unit in model.units},
        compute={stage: random_seconds(rng) for stage in stages},
        copy={unit: random_seconds(rng) for unit in model.units},
        kv_load={stage: random_seconds(rng) for stage in stages},
        kv_save={stage: random_seconds(rng) for stage in stages},
        on_device=frozenset(s for s, unit in model.unit_of_stage.items() if unit in model.on_device),
    )


@given(models(), whole_passes, st.integers(0, 1 << 32))
@settings(max_examples=300)
def test_pipelined_is_never_slower_than_layer_nor_layer_than_sequential(
    model: Model, passes: list[Pass], seed: int
) -> None:
    """On one drive that serves reads in turn, until the last stage is computed.

    A pass expects the next one to have outputs. Before each that has none, head units may have been read too early,
    each once: it then stays until it is computed.
    """
    costs = random_costs(model, random.Random(seed))
    seconds = {}
    for schedule in SCHEDULES:
        simulator = Simulator(model.unit_of_stage)
        for _, steps in run_all(model, schedule, passes):
            simulator.run(steps, costs)
        seconds[schedule] = simulator.computed
    computed = [need.stage_idx for each in passes for need in (model.needs if each.has_outputs else model.body)]
    num_surprises = sum(not each.has_outputs for each in passes)
    early_s = num_surprises * sum(costs.read[u] for u in _units(model.head) if u in model.classes)
    slack = 1e-9 * (1 + seconds["sequential"])
    assert sum(costs.compute[stage] for stage in computed) <= seconds["pipelined"] + slack, f"{seed=}"
    assert seconds["pipelined"] <= seconds["layer"] + early_s + slack, f"{seed=} {seconds}"
    assert seconds["layer"] <= seconds["sequential"] + slack, f"{seed=} {seconds}"


@schedules
@given(three_tiers, whole_passes, st.integers(0, 1 << 32))
def test_simulated_lanes_do_one_thing_at_a_time(schedule: str, model: Model, passes: list[Pass], seed: int) -> None:
    """And no stage begins before its unit arrived, no transfer before its source did or its slot was free."""
    costs = random_costs(model, random.Random(seed))
    simulator = Simulator(model.unit_of_stage)
    for _, steps in run_all(model, schedule, passes):
        simulator.run(steps, costs)
    spans = simulator.spans
    for lane in Lane:
        for one, next_one in pairwise(span for span in spans if span.lane is lane):
            assert one.end <= next_one.begin
    computed = [span for span in spans if span.step.kind is StepKind.COMPUTE]
    for one, next_one in pairwise(computed):
        assert one.end <= next_one.begin, "a stage before the one whose result it needs"
    assert simulator.now >= max((span.end for span in computed), default=0.0)


@schedules
@given(three_tiers, whole_passes, st.integers(0, 1 << 32))
def test_simulated_keys_and_values_wait_for_their_slot_and_are_waited_for(
    schedule: str, model: Model, passes: list[Pass], seed: int
) -> None:
    """Of two slots that micro-batches take in turn: loaded once the one before the last has been saved."""
    rng = random.Random(seed)
    costs = replace(
        random_costs(model, rng), **{name: _positive(model, rng) for name in ("kv_load", "kv_save", "compute")}
    )
    simulator = Simulator(model.unit_of_stage)
    for _, steps in run_all(model, schedule, passes):
        simulator.run(steps, costs)
    moving = {need.stage_idx for need in model.needs if need.moves_kv}
    loads, computes, saves = (
        [span for span in simulator.spans if span.step.kind is kind and span.step.stage_idx in moving]
        for kind in (StepKind.KV_LOAD, StepKind.COMPUTE, StepKind.KV_SAVE)
    )
    expected = [turn for each in passes for turn in turns(model.needs if each.has_outputs else model.body)]
    expected = [turn for turn in expected if turn[0] in moving]
    for spans in (loads, computes, saves):
        assert [(span.step.stage_idx, span.step.micro_batch) for span in spans] == expected
    for load, compute, save in zip(loads, computes, saves, strict=True):
        assert load.end <= compute.begin and compute.end <= save.begin
    for save, load in zip(saves, loads[2:], strict=False):
        assert save.end <= load.begin


def _positive(model: Model, rng: random.Random) -> dict[int, float]:
    return {need.stage_idx: 0.1 + rng.random() for need in model.needs}
