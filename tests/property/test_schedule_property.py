"""Whatever the model, the slots and the passes before: every schedule reads what it computes, and holds its slots."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipo.planner.residency import Step, StepKind, Tier, UnitId
from pipo.planner.schedule import SCHEDULES
from tests.support.scheduling import (
    ONE_SLOT_EACH,
    ONLY_HEAD_STREAMS,
    Model,
    Pass,
    apply_all,
    check_list,
    models,
    passes,
    run_all,
    schedules,
    three_tiers,
    units_of,
)


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
    needed = units_of(model.needs if has_outputs else model.body)
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
            pending = units_of(needs[num_computed:])
            following = [u for u in model.units if state.is_streamed(u)]
            # a unit that this pass still computes ends the look-ahead of the next: it will keep its slot
            stop = next((i for i, u in enumerate(following) if u in pending), len(following))
            unread = [u for u in [*pending, *following[:stop]] if state.wants_read(u)]
            assert not unread or not state.ram.has_place(unread[0])
            num_computed += 1


@given(models(), passes)
def test_pipelined_reads_in_the_order_of_need(model: Model, passes: list[Pass]) -> None:
    for each, (_, steps) in zip(passes, run_all(model, "pipelined", passes), strict=True):
        order = units_of(model.needs if each.has_outputs else model.body)
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
            later = units_of(needs[i + 2 :])
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
