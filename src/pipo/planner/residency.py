"""What is where, and the steps that change it.

A unit moves disk → RAM → device as far as the place where its stage computes. In each tier it either stays for good
or passes through a slot. A schedule works ahead on a copy of the `Residency`; the executor and the simulator apply
each step to their own as it happens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import NamedTuple, NewType, Protocol

UnitId = NewType("UnitId", int)
SlotId = NewType("SlotId", int)


class Tier(Enum):
    RAM = "ram"
    DEVICE = "device"


class StepKind(Enum):
    READ = "read"  # disk → RAM
    COPY = "copy"  # RAM → device
    COMPUTE = "compute"
    ROUTE = "route"  # learn which experts a stage needs, and go on with the steps that bring and compute them
    EXPERTS = "experts"  # compute some of them
    GUESS = "guess"  # READ of an expert that the next block may need, after all that is needed for certain
    HURRY = "hurry"  # the guess was right: its read is as urgent as any other from now on
    DROP = "drop"  # the guess was wrong: its read is not wanted, unless it has begun
    RELEASE = "release"
    KV_LOAD = "kv load"  # keys and values of a stage, RAM → device
    KV_SAVE = "kv save"  # the new ones, device → RAM
    BARRIER = "barrier"


class Step(NamedTuple):
    """`stage_idx` is set for COMPUTE, the KV steps and those of experts; `unit_id` for what moves; `slot_id` where the
    unit has a slot in the tier that the step is about; `units` for EXPERTS, where none means to add up their results;
    `micro_batch` for stages whose keys and values move.
    """

    kind: StepKind
    stage_idx: int = -1
    unit_id: UnitId = UnitId(-1)
    slot_id: SlotId = SlotId(-1)
    tier: Tier = Tier.RAM
    units: tuple[UnitId, ...] = ()
    micro_batch: int = 0

    @property
    def turn(self) -> tuple[int, int]:
        """The stage, and which micro-batch of it."""
        return self.stage_idx, self.micro_batch


class Need(NamedTuple):
    """One stage of the pass, and the unit it cannot compute without (None: its weights are always there).

    `num_micro_batches`: in how many its keys and values, which live in RAM, are wanted on the device; 0: they do not
    move. `is_routed`: it needs experts, which are known once the stage before it was computed.
    """

    stage_idx: int
    unit_id: UnitId | None
    num_micro_batches: int = 0
    is_routed: bool = False

    @property
    def moves_kv(self) -> bool:
        return self.num_micro_batches > 0


def in_micro_batches(needs: Sequence[Need], num: int) -> Sequence[Need]:
    """Where keys and values move, they do so in as many."""
    if num == 1:
        return needs
    return [need._replace(num_micro_batches=num) if need.moves_kv else need for need in needs]


class Slots(Protocol):
    """Places that units of a kind take in turn."""

    def owns(self, unit: UnitId) -> bool: ...

    def take(self, unit: UnitId, slot: SlotId) -> None: ...

    def give_back(self, unit: UnitId) -> None: ...


@dataclass(slots=True)
class Pool:
    """The places of one tier.

    `classes` gives the slots that a unit passing through may use, as an index into `free`. `missing` are the units
    that will stay here and have not been asked for yet. A copy shares the classes: they change between passes only.
    """

    classes: dict[UnitId, int]
    free: list[deque[SlotId]]
    missing: set[UnitId]
    held: dict[UnitId, SlotId] = field(default_factory=dict)

    @property
    def num_slots(self) -> list[int]:
        """Of each class, whether free or held."""
        held = [self.classes[unit] for unit in self.held]
        return [len(slots) + held.count(i) for i, slots in enumerate(self.free)]

    def wants(self, unit: UnitId) -> bool:
        return unit not in self.held if unit in self.classes else unit in self.missing

    def has_place(self, unit: UnitId) -> bool:
        return unit not in self.classes or bool(self.free[self.classes[unit]])

    def next_slot(self, unit: UnitId) -> SlotId:
        """That `unit` would take; -1 when it stays for good."""
        return self.free[self.classes[unit]][0] if unit in self.classes else SlotId(-1)

    def take(self, unit: UnitId, slot: SlotId) -> None:
        if unit in self.classes:
            self.free[self.classes[unit]].remove(slot)
            self.held[unit] = slot
        else:
            self.missing.discard(unit)

    def give_back(self, unit: UnitId) -> None:
        self.free[self.classes[unit]].append(self.held.pop(unit))

    def keep(self, unit: UnitId) -> None:
        """It stays from now on, though it passed through; its slot was given back."""
        del self.classes[unit]
        self.missing.add(unit)

    def let_pass(self, unit: UnitId, slot_class: int) -> None:
        """It passes through from now on, though it stayed."""
        self.missing.discard(unit)
        self.classes[unit] = slot_class

    def copy(self) -> Pool:
        return Pool(self.classes, [deque(slots) for slots in self.free], set(self.missing), dict(self.held))


def numbered_slots(counts: Sequence[int], first: int = 0) -> list[deque[SlotId]]:
    """So many of each class, numbered from `first` through all of them: what is free before the first pass."""
    firsts = accumulate(counts, initial=first)
    return [deque(map(SlotId, range(start, start + count))) for start, count in zip(firsts, counts, strict=False)]


def empty_pool() -> Pool:
    return Pool({}, [], set())


@dataclass(slots=True)
class Residency:
    """Which unit is where in RAM and on the device. `on_device` are the units whose stages compute there.

    `experts` have slots of their own, of which no schedule disposes ahead: copies share them.
    """

    ram: Pool
    device: Pool = field(default_factory=empty_pool)
    on_device: frozenset[UnitId] = frozenset()
    experts: Slots | None = None

    @property
    def is_settled(self) -> bool:
        """Nothing moves any more: every unit stays where it computes, and was asked for."""
        pools = (self.ram, self.device)
        moves = any(self.is_streamed(unit) for pool in pools for unit in pool.classes)
        return not moves and not any(pool.missing for pool in pools)

    def pool(self, tier: Tier) -> Pool:
        return self.device if tier is Tier.DEVICE else self.ram

    def tier_of(self, unit: UnitId) -> Tier:
        """Where its stage computes."""
        return Tier.DEVICE if unit in self.on_device else Tier.RAM

    def is_streamed(self, unit: UnitId) -> bool:
        """It has to move in every pass."""
        return unit in self.pool(self.tier_of(unit)).classes

    def wants_read(self, unit: UnitId) -> bool:
        is_needed = unit not in self.on_device or self.device.wants(unit)
        return is_needed and self.ram.wants(unit)

    def wants_copy(self, unit: UnitId) -> bool:
        return unit in self.on_device and self.device.wants(unit)

    def can_copy(self, unit: UnitId) -> bool:
        """It was asked for in RAM, and has a place on the device."""
        return not self.ram.wants(unit) and self.device.has_place(unit)

    def read(self, unit: UnitId) -> Step:
        return self.apply(Step(StepKind.READ, unit_id=unit, slot_id=self.ram.next_slot(unit)))

    def copy_up(self, unit: UnitId) -> Step:
        return self.apply(Step(StepKind.COPY, unit_id=unit, slot_id=self.device.next_slot(unit), tier=Tier.DEVICE))

    def release(self, unit: UnitId, tier: Tier) -> Step:
        slot = self.pool(tier).held[unit]
        return self.apply(Step(StepKind.RELEASE, unit_id=unit, slot_id=slot, tier=tier))

    def apply(self, step: Step) -> Step:
        """Make this what it is after the step, and return the step."""
        if self.experts is not None and self.experts.owns(step.unit_id):
            if step.kind in (StepKind.READ, StepKind.GUESS):
                self.experts.take(step.unit_id, step.slot_id)
            elif step.kind in (StepKind.RELEASE, StepKind.DROP):
                self.experts.give_back(step.unit_id)
        elif step.kind is StepKind.READ:
            self.ram.take(step.unit_id, step.slot_id)
        elif step.kind is StepKind.COPY:
            self.device.take(step.unit_id, step.slot_id)
        elif step.kind is StepKind.RELEASE:
            self.pool(step.tier).give_back(step.unit_id)
        return step

    def copy(self) -> Residency:
        return Residency(self.ram.copy(), self.device.copy(), self.on_device, self.experts)
