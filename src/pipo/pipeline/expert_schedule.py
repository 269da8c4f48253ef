"""What happens once a block's experts are known: steps that bring them, compute them, and read ahead for the next one.

Each step is done before the next one is asked for, so what is held is always what is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from pipo.pipeline.expert_cache import ExpertCache
from pipo.pipeline.expert_stats import ExpertStats
from pipo.planner.residency import Step, StepKind, UnitId

FILLING = 2  # experts that are read for no other reason than that there is room


@dataclass(frozen=True, slots=True)
class Visit:
    """A block in a pass. `needed` and `guessed`, of the next block, in the order of their numbers.

    `groups` cuts those that have arrived into what is computed at once. `in_order`: results are added as they come, so
    that experts are computed in the order of their numbers whether they have arrived or not. `at_once`: results of all
    experts together are added as they come too.
    """

    stage_idx: int
    block: int
    needed: Sequence[UnitId]
    guessed: Sequence[UnitId]
    groups: Callable[[Sequence[UnitId]], Iterator[tuple[UnitId, ...]]]
    in_order: bool
    at_once: bool


@dataclass(slots=True)
class Guesses:
    """Experts that are kept because the next block may need them. `asked_for` are those that were read for it."""

    units: Collection[UnitId] = ()
    asked_for: set[UnitId] = field(default_factory=set)


class ExpertSchedule:
    """Steps of one visit after another. At most `num_ahead` reads are under way for experts that are not computed yet.

    Threads: one.
    """

    def __init__(self, cache: ExpertCache, num_ahead: int, stats: ExpertStats) -> None:
        self.stats = stats
        self._cache = cache
        self._num_ahead = num_ahead
        self._guesses = Guesses()
        self._filling: list[UnitId] = []

    def steps(self, visit: Visit, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        cache = self._cache
        cache.keep(visit.needed)
        guesses_before = self._guesses
        yield from self._settle_guesses(visit, is_here)
        missing = deque(unit for unit in visit.needed if unit not in cache.held)
        self.stats.note(visit.block, visit.needed, missing, guesses_before.units, guesses_before.asked_for)
        self._expect(visit)
        guesses = deque(unit for unit in visit.guessed if unit not in cache.held)
        groups = self._groups(visit, is_here)
        is_sum_apart = not visit.in_order and not (visit.at_once and len(groups) == 1)
        under_way: set[UnitId] = set()
        while groups:
            yield from self._bring(StepKind.READ, missing, under_way, visit)
            if groups[0][0] not in cache.held:
                yield from self._make_room(missing, visit)
                continue
            if not missing:
                yield from self._guess(guesses, under_way, visit)
            group = groups.popleft()
            yield Step(StepKind.EXPERTS, visit.stage_idx, units=group)
            cache.let_go(group)
            under_way.difference_update(group)
        if is_sum_apart:
            yield Step(StepKind.EXPERTS, visit.stage_idx)
        yield from self._guess(guesses, under_way, visit)
        yield from self._fill(is_here)

    def _fill(self, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        """While slots are free: experts nobody has asked for, a few at a time and after all else."""
        self._filling = [unit for unit in self._filling if not is_here(unit)]
        while len(self._filling) < FILLING:
            found = self._cache.never_read()
            if found is None:
                return
            unit, slot = found
            self._filling.append(unit)
            yield Step(StepKind.GUESS, unit_id=unit, slot_id=slot)

    def _groups(self, visit: Visit, is_here: Callable[[UnitId], bool]) -> deque[tuple[UnitId, ...]]:
        """What is computed at once, in order: those that are here first, where the order is free."""
        here = [unit for unit in visit.needed if not visit.in_order and is_here(unit)]
        return deque([*visit.groups(here), *((unit,) for unit in visit.needed if unit not in set(here))])

    def _make_room(self, missing: deque[UnitId], visit: Visit) -> Iterator[Step]:
        """More experts are kept for this block than there are slots beside them: the last one is read again later."""
        last = next(unit for unit in reversed(visit.needed) if unit in self._cache.held)
        yield Step(StepKind.RELEASE, unit_id=last, slot_id=self._cache.held[last])
        missing.append(last)
        ordered = sorted(missing)
        missing.clear()
        missing.extend(ordered)

    def forget(self) -> None:
        """Guesses of a pass that was cut short."""
        self._guesses = Guesses()
        self._cache.let_all_go()

    def _settle_guesses(self, visit: Visit, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        """Guesses about this block: right ones hurry, wrong ones are dropped or may go."""
        guesses, self._guesses = self._guesses, Guesses()
        wrong = set(guesses.units) - set(visit.needed)
        for unit in guesses.asked_for:
            if unit in wrong and not is_here(unit):
                yield Step(StepKind.DROP, unit_id=unit)
            elif unit not in wrong and not is_here(unit):
                yield Step(StepKind.HURRY, unit_id=unit)
        self._cache.let_go(wrong)

    def _expect(self, visit: Visit) -> None:
        self._guesses = Guesses(visit.guessed)
        self._cache.keep(visit.guessed)

    def _guess(self, units: deque[UnitId], under_way: set[UnitId], visit: Visit) -> Iterator[Step]:
        for step in self._bring(StepKind.GUESS, units, under_way, visit):
            yield step
            if step.kind is StepKind.GUESS:
                self._guesses.asked_for.add(step.unit_id)

    def _bring(self, kind: StepKind, units: deque[UnitId], under_way: set[UnitId], visit: Visit) -> Iterator[Step]:
        """As many as there are places for, in place of those that are wanted last."""
        cache = self._cache
        while units and len(under_way) < self._num_ahead:
            slot = cache.slot_for(units[0])
            if slot is not None:
                unit = units.popleft()
                yield Step(kind, unit_id=unit, slot_id=slot)
                cache.keep([unit])
                under_way.add(unit)
                continue
            leaving = cache.first_to_go(units[0], visit.block)
            if leaving is None and kind is StepKind.READ:  # what is needed goes before what may be
                cache.let_go(self._guesses.units)
                leaving = cache.first_to_go(units[0], visit.block)
            if leaving is None:
                return
            yield Step(StepKind.RELEASE, unit_id=leaving, slot_id=cache.held[leaving])
