"""What happens in a pass, in which order: pure functions from residency to a list of steps.

The executor walks the list on one thread. READ starts a transfer and returns at once, COMPUTE waits for the one unit
it needs, RELEASE frees a slot, BARRIER waits for every transfer in flight. Overlap is therefore the *order* of the
list: the three schedules below differ in nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, NewType

UnitId = NewType("UnitId", int)
SlotId = NewType("SlotId", int)


class StepKind(Enum):
    READ = "read"
    COMPUTE = "compute"
    RELEASE = "release"
    BARRIER = "barrier"


class Step(NamedTuple):
    """`stage_idx` is set for COMPUTE; `unit_id` for READ and RELEASE; `slot_id` when the unit goes to a slot."""

    kind: StepKind
    stage_idx: int = -1
    unit_id: UnitId = UnitId(-1)
    slot_id: SlotId = SlotId(-1)


class Need(NamedTuple):
    """One stage of the pass, and the unit it cannot compute without (None: its weights are always resident)."""

    stage_idx: int
    unit_id: UnitId | None


@dataclass(slots=True)
class Residency:
    """Which streamed unit is in which slot, and which resident units have not been read yet.

    `classes` gives the slots each streamed unit may use, as an index into `free`; a unit without one is resident.
    A schedule is given a copy and works ahead on it; the executor applies each step to the real one as it happens.
    """

    classes: Mapping[UnitId, int]
    free: list[deque[SlotId]]
    unread: set[UnitId]
    held: dict[UnitId, SlotId] = field(default_factory=dict)

    @property
    def is_settled(self) -> bool:
        """Nothing streams and everything has been read."""
        return not self.classes and not self.unread

    @property
    def num_slots(self) -> list[int]:
        """Of each class, whether free or held."""
        held = [self.classes[unit] for unit in self.held]
        return [len(slots) + held.count(i) for i, slots in enumerate(self.free)]

    def is_streamed(self, unit: UnitId) -> bool:
        return unit in self.classes

    def has_place(self, unit: UnitId) -> bool:
        return not self.is_streamed(unit) or bool(self.free[self.classes[unit]])

    def wants_read(self, unit: UnitId) -> bool:
        return unit not in self.held if self.is_streamed(unit) else unit in self.unread

    def read(self, unit: UnitId) -> Step:
        slot = self.free[self.classes[unit]][0] if self.is_streamed(unit) else SlotId(-1)
        return self.apply(Step(StepKind.READ, unit_id=unit, slot_id=slot))

    def release(self, unit: UnitId) -> Step:
        return self.apply(Step(StepKind.RELEASE, unit_id=unit, slot_id=self.held[unit]))

    def apply(self, step: Step) -> Step:
        """Make the residency what it is after a READ or RELEASE."""
        unit = step.unit_id
        if step.kind is StepKind.RELEASE:
            self.free[self.classes[unit]].append(self.held.pop(unit))
        elif self.is_streamed(unit):
            self.free[self.classes[unit]].remove(step.slot_id)
            self.held[unit] = step.slot_id
        else:
            self.unread.discard(unit)
        return step

    def copy(self) -> Residency:
        return Residency(self.classes, [deque(slots) for slots in self.free], set(self.unread), dict(self.held))


Schedule = Callable[[Sequence[Need], Sequence[UnitId], Residency], list[Step]]


def pipelined(needs: Sequence[Need], next_units: Sequence[UnitId], residency: Residency) -> list[Step]:
    """Reads run ahead as far as the slots allow, in the order of need, across the end of the pass.

    `next_units` are the units of the following pass in order; their reads fill the slots this pass no longer needs.
    """
    wanted = [need.unit_id for need in needs if need.unit_id is not None]
    steps = list(_drop_all_but([*wanted, *next_units], residency))
    ahead = _ReadAhead(wanted, next_units, residency)
    steps += ahead.advance()
    for need in needs:
        steps.append(Step(StepKind.COMPUTE, need.stage_idx))
        if need.unit_id is not None:
            ahead.consumed(need.unit_id)
            if residency.is_streamed(need.unit_id):
                steps.append(residency.release(need.unit_id))
            steps += ahead.advance()
    return steps


class _ReadAhead:
    """The read cursor: every unit of this pass and the next, in the order of need."""

    def __init__(self, wanted: Sequence[UnitId], following: Sequence[UnitId], residency: Residency) -> None:
        self._queue = deque(wanted)
        self._following = deque(u for u in following if residency.is_streamed(u))
        self._pending = deque(wanted)
        self._residency = residency

    def consumed(self, unit: UnitId) -> None:
        assert self._pending.popleft() == unit

    def advance(self) -> Iterator[Step]:
        yield from self._drain(self._queue, lambda unit: False)
        if not self._queue:
            # a unit still to be computed in this pass keeps its slot: reading it again would only waste the drive
            yield from self._drain(self._following, self._pending.__contains__)

    def _drain(self, queue: deque[UnitId], must_wait: Callable[[UnitId], bool]) -> Iterator[Step]:
        while queue:
            unit = queue[0]
            if must_wait(unit):
                return
            if self._residency.wants_read(unit):
                if not self._residency.has_place(unit):
                    return
                yield self._residency.read(unit)
            queue.popleft()


def sequential(needs: Sequence[Need], next_units: Sequence[UnitId], residency: Residency) -> list[Step]:
    """Read, compute, read, compute: nothing overlaps. The lower bound of the ablation."""
    steps = list(_drop_all_but([], residency))
    for need in needs:
        unit = need.unit_id
        if unit is not None and residency.wants_read(unit):
            steps.append(residency.read(unit))
        steps.append(Step(StepKind.COMPUTE, need.stage_idx))
        if unit is not None and residency.is_streamed(unit):
            steps.append(residency.release(unit))
    return steps


def layerwise(needs: Sequence[Need], next_units: Sequence[UnitId], residency: Residency) -> list[Step]:
    """FlexGen's order: while a layer computes the next one loads, then both are waited for.

    Attention and MLP are layers of their own. The look-ahead is one layer, across the end of the pass too.
    Source: FlexLLMGen, `generation_loop_overlap_single_batch`.
    """
    wanted = [need.unit_id for need in needs if need.unit_id is not None]
    steps = list(_drop_all_but(wanted[:1], residency))
    after: list[UnitId | None] = [need.unit_id for need in needs[1:]]
    after.append(next_units[0] if next_units else None)
    for need, ahead in zip(needs, after, strict=True):
        unit = need.unit_id
        if unit is not None and residency.wants_read(unit):
            steps += [residency.read(unit), Step(StepKind.BARRIER)]
        if ahead is not None and ahead != unit and residency.wants_read(ahead) and residency.has_place(ahead):
            steps.append(residency.read(ahead))
        steps += [Step(StepKind.COMPUTE, need.stage_idx), Step(StepKind.BARRIER)]
        if unit is not None and residency.is_streamed(unit):
            steps.append(residency.release(unit))
    return steps


def _drop_all_but(order: Iterable[UnitId], residency: Residency) -> Iterator[Step]:
    """Release what is held, except the units that reading in this order would fill the slots with.

    A pass that was cut short leaves units behind which this one needs only late: they would block the early ones.
    """
    num_free = residency.num_slots
    keep: set[UnitId] = set()
    for unit in order:
        if residency.is_streamed(unit) and unit not in keep and num_free[residency.classes[unit]]:
            num_free[residency.classes[unit]] -= 1
            keep.add(unit)
    for unit in [u for u in residency.held if u not in keep]:
        yield residency.release(unit)


SCHEDULES: dict[str, Schedule] = {"pipelined": pipelined, "sequential": sequential, "layer": layerwise}
