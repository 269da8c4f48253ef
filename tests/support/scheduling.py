"""Models, passes and slots for schedules to be tried on, and a replay that checks every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st

from pipo.planner.residency import Need, Pool, Residency, SlotId, Step, StepKind, Tier, UnitId
from pipo.planner.schedule import SCHEDULES

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
        return units_of(self.needs)

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


def units_of(needs: Sequence[Need]) -> list[UnitId]:
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
