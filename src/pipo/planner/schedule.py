"""What happens in a pass, in which order: pure functions from residency to a list of steps.

The executor walks the list on one thread. READ and COPY start a transfer and return at once; a transfer begins when
those before it on its link are done, its source has arrived and whatever used its slot before has ended. COMPUTE waits
for the one unit it needs, RELEASE frees a slot for later steps, BARRIER waits for everything in flight. Overlap is
therefore the *order* of the list: the three schedules below differ in nothing else. Every step waits only for steps
before it in the list, and each link serves its own in that order, so no schedule can deadlock.

A stage whose keys and values move computes one micro-batch of sequences after another before the next stage begins:
its weights move once, and there are never keys and values of more than two of them on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from pipo.planner.residency import Need, Residency, Step, StepKind, Tier, UnitId

Schedule = Callable[[Sequence[Need], Sequence[UnitId], Residency], list[Step]]


def pipelined(needs: Sequence[Need], next_units: Sequence[UnitId], residency: Residency) -> list[Step]:
    """Transfers run ahead as far as the slots allow, in the order of need, across the end of the pass.

    `next_units` are the units of the following pass in order; they fill the slots this pass no longer needs. Keys and
    values that move are loaded one micro-batch ahead.
    """
    wanted = [need.unit_id for need in needs if need.unit_id is not None]
    steps = list(_drop_all_but([*wanted, *next_units], residency))
    ahead = _Ahead(wanted, next_units, residency)
    kv_loads = deque(load for need in needs for load in _kv_loads(need))
    steps += ahead.advance()
    steps += _next_of(kv_loads)
    for need in needs:
        for turn in _turns(need):
            if need.moves_kv:
                steps += _next_of(kv_loads)
            steps += turn
        if need.unit_id is not None:
            ahead.consumed(need.unit_id)
            steps += _release(need.unit_id, residency)
            steps += ahead.advance()
    return steps


class _Ahead:
    """Two cursors, one per link, over every unit of this pass and the next in the order of need."""

    def __init__(self, wanted: Sequence[UnitId], following: Sequence[UnitId], residency: Residency) -> None:
        streamed = [u for u in following if residency.is_streamed(u)]
        self._pending = deque(wanted)
        self._residency = residency
        self._to_read = deque(wanted), deque(streamed)
        self._to_copy = (
            deque(u for u in wanted if u in residency.on_device),
            deque(u for u in streamed if u in residency.on_device),
        )

    def consumed(self, unit: UnitId) -> None:
        assert self._pending.popleft() == unit

    def advance(self) -> Iterator[Step]:
        """A copy frees a slot in RAM, which lets the next read be asked for, and so on."""
        while moved := [*self._drain(*self._to_read, self._read), *self._drain(*self._to_copy, self._copy)]:
            yield from moved

    def _drain(
        self, queue: deque[UnitId], following: deque[UnitId], move: Callable[[UnitId], list[Step] | None]
    ) -> Iterator[Step]:
        for units, is_next_pass in ((queue, False), (following, True)):
            while units:
                # a unit still to be computed in this pass keeps its slot: moving it again would only waste the link
                if is_next_pass and units[0] in self._pending:
                    return
                steps = move(units[0])
                if steps is None:
                    return
                yield from steps
                units.popleft()

    def _read(self, unit: UnitId) -> list[Step] | None:
        """None where it has to wait for a slot."""
        if not self._residency.wants_read(unit):
            return []
        return [self._residency.read(unit)] if self._residency.ram.has_place(unit) else None

    def _copy(self, unit: UnitId) -> list[Step] | None:
        if not self._residency.wants_copy(unit):
            return []
        return list(_copy(unit, self._residency)) if self._residency.can_copy(unit) else None


def sequential(needs: Sequence[Need], next_units: Sequence[UnitId], residency: Residency) -> list[Step]:
    """Read, copy, compute, read, copy, compute: nothing overlaps. The lower bound of the ablation."""
    steps = list(_drop_all_but([], residency))
    for need in needs:
        unit = need.unit_id
        if unit is not None:
            steps += _fetch(unit, residency)
        kv_loads = deque(_kv_loads(need))
        for turn in _turns(need):
            steps += [*_next_of(kv_loads), *turn]
            if need.moves_kv or unit in residency.on_device:
                steps.append(Step(StepKind.BARRIER))
        if unit is not None:
            steps += _release(unit, residency)
    return steps


def layerwise(needs: Sequence[Need], next_units: Sequence[UnitId], residency: Residency) -> list[Step]:
    """FlexGen's order: while a micro-batch of a layer computes the next one's keys and values load and the last one's
    are saved, beside its first one the next layer's weights; then all of these are waited for.

    Attention and MLP are layers of their own. The look-ahead is one layer, across the end of the pass too.
    Source: FlexLLMGen, `generation_loop_overlap_single_batch`.
    """
    wanted = [need.unit_id for need in needs if need.unit_id is not None]
    steps = list(_drop_all_but(wanted[:1], residency))
    after = [*needs[1:], Need(-1, next_units[0] if next_units else None)]
    kv_loads: deque[Step] = deque()
    if needs:
        kv_loads += _kv_loads(needs[0])
        steps += _next_of(kv_loads)
    unsaved: list[Step] = []
    for need, ahead in zip(needs, after, strict=True):
        if need.unit_id is not None and (fetched := _fetch(need.unit_id, residency)):
            steps += [*fetched, Step(StepKind.BARRIER)]
        kv_loads += _kv_loads(ahead)
        for i, (compute, *saves) in enumerate(_turns(need)):
            steps += unsaved
            if not i and ahead.unit_id is not None and ahead.unit_id != need.unit_id:
                steps += _fetch(ahead.unit_id, residency)
            steps += [*_next_of(kv_loads), compute, Step(StepKind.BARRIER)]
            unsaved = saves
        if need.unit_id is not None:
            steps += _release(need.unit_id, residency)
    return [*steps, *unsaved, Step(StepKind.BARRIER)] if unsaved else steps


def _turns(need: Need) -> Iterator[list[Step]]:
    """What computes the stage, and saves what is new: once, or one micro-batch after another."""
    if not need.moves_kv:
        yield [Step(StepKind.ROUTE if need.is_routed else StepKind.COMPUTE, need.stage_idx)]
    for i in range(need.num_micro_batches):
        yield [Step(kind, need.stage_idx, micro_batch=i) for kind in (StepKind.COMPUTE, StepKind.KV_SAVE)]


def _kv_loads(need: Need) -> Iterator[Step]:
    return (Step(StepKind.KV_LOAD, need.stage_idx, micro_batch=i) for i in range(need.num_micro_batches))


def _next_of(steps: deque[Step]) -> Iterator[Step]:
    if steps:
        yield steps.popleft()


def _fetch(unit: UnitId, residency: Residency) -> list[Step]:
    """All that brings a unit to where it computes, as far as there is room."""
    steps = []
    if residency.wants_read(unit) and residency.ram.has_place(unit):
        steps.append(residency.read(unit))
    if residency.wants_copy(unit) and residency.can_copy(unit):
        steps += _copy(unit, residency)
    return steps


def _copy(unit: UnitId, residency: Residency) -> Iterator[Step]:
    """To the device; what it was staged in is free for reads from then on."""
    yield residency.copy_up(unit)
    if unit in residency.ram.classes:
        yield residency.release(unit, Tier.RAM)


def _release(unit: UnitId, residency: Residency) -> Iterator[Step]:
    if residency.is_streamed(unit):
        yield residency.release(unit, residency.tier_of(unit))


def _drop_all_but(order: Iterable[UnitId], residency: Residency) -> Iterator[Step]:
    """Release what is held, except the units that moving in this order would fill the slots with.

    A pass that was cut short leaves units behind which this one needs only late: they would block the early ones.
    """
    order = list(order)
    for tier in (Tier.DEVICE, Tier.RAM):  # what leaves the device has to come through RAM again
        pool = residency.pool(tier)
        num_free = pool.num_slots
        keep: set[UnitId] = set()
        for unit in order:
            if unit not in pool.classes or unit in keep or not num_free[pool.classes[unit]]:
                continue
            if tier is Tier.RAM and unit in residency.on_device and not residency.device.wants(unit):
                continue  # it is on the device already
            num_free[pool.classes[unit]] -= 1
            keep.add(unit)
        for unit in [u for u in pool.held if u not in keep]:
            yield residency.release(unit, tier)


SCHEDULES: dict[str, Schedule] = {"pipelined": pipelined, "sequential": sequential, "layer": layerwise}
"""By the name that `--schedule` takes."""
