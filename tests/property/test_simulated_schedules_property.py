"""Every schedule as the simulator runs it: lanes do one thing at a time, and the better schedule is never slower."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.planner.residency import StepKind
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane, Simulator, StepCosts
from tests.support.scheduling import Model, Pass, models, run_all, schedules, three_tiers, turns, units_of, whole_passes


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
    early_s = num_surprises * sum(costs.read[u] for u in units_of(model.head) if u in model.classes)
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
