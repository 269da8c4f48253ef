"""planner.predict over three tiers: against seconds counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipo.base.machine import LinkProfile, SharedUse
from pipo.planner.cost import PassLoad, attention_seconds, beside_each_other, stage_seconds, step_costs
from pipo.planner.device_placement import place_on_device
from pipo.planner.placement import UnitRole, place, smallest_bytes
from pipo.planner.predict import BETWEEN_PASSES_S, Placed, Workload, decode_load, forecast, predict, residency_of
from pipo.planner.residency import UnitId
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane, StepCosts
from tests.support.machines import GPU, MACHINE
from tests.support.planned import (
    HIDDEN_SIZE,
    MIB,
    WITH_GPU,
    Sizes,
    all_on_device,
    device_demand,
    placed,
    ram_demand,
    shapes,
)

SIZES = Sizes()
PIPELINED = SCHEDULES["pipelined"]
REQUEST = Workload(prompt_tokens=100, answer_tokens=50)
ROOMY = 1 << 40


def device_s(load: PassLoad, *, starts: bool) -> float:
    """Of all stages on the device."""
    seconds = step_costs(shapes(SIZES).stages, WITH_GPU, load, HIDDEN_SIZE, frozenset(range(99))).compute.values()
    return sum(seconds) - (0 if starts else GPU.graph_start_s * len(seconds))


def test_only_positions_before_the_pass_are_loaded() -> None:
    """A prompt's first chunk sees itself, and finds nothing in RAM."""
    stages, on_device = shapes(SIZES).stages, frozenset({0})

    def loaded_s(load: PassLoad) -> float:
        return step_costs(stages, WITH_GPU, load, HIDDEN_SIZE, on_device).kv_load[0]

    link = GPU.from_host
    assert link is not None
    assert loaded_s(PassLoad(1, 64, 32)) == pytest.approx(link.latency_s)
    assert loaded_s(PassLoad(1, 64, 100 + 32)) == pytest.approx(link.seconds(100 * SIZES.kv_per_position))
    assert loaded_s(PassLoad(3, 1, 100.5)) == pytest.approx(link.seconds(3 * 100 * SIZES.kv_per_position))


def test_a_head_computes_one_row_of_each_sequence() -> None:
    """However long the prompt: only the newest token's logits are wanted."""
    *_, head = shapes(SIZES).stages
    head = replace(head, is_head=True)
    cpu = WITH_GPU.cpu
    assert stage_seconds(head, cpu, PassLoad(1, 128, 64)) == pytest.approx(stage_seconds(head, cpu, PassLoad(1, 1)))
    assert stage_seconds(head, cpu, PassLoad(4, 32, 64)) == pytest.approx(stage_seconds(head, cpu, PassLoad(4, 1)))


def test_a_mixed_pass_shares_the_products_and_nothing_of_attention() -> None:
    """Eight answers beside a chunk of 56: as many rows as a chunk of 64, and each group's attention by itself."""
    chunk, answers = PassLoad(1, 56, 28), PassLoad(8, 1, 500)
    mixed = replace(answers, others=(chunk,))
    assert mixed.num_tokens == 64 and mixed.num_rows_of_head == 9
    assert mixed.cached_positions == pytest.approx(8 * 499.5)
    assert mixed.positions_held == pytest.approx((8 * 500.5 + 56) / 9)
    here = placed(SIZES, ROOMY)
    found, shared = here.costs(mixed), here.costs(PassLoad(1, 64, 0))
    alone = [here.costs(load) for load in (answers, chunk)]
    for i, stage in enumerate(here.shapes.stages):
        attention = sum(attention_seconds(stage, here.machine.cpu, load) for load in (answers, chunk))
        assert attention_seconds(stage, here.machine.cpu, mixed) == pytest.approx(attention)
        if not stage.is_head:
            assert found.compute[i] == pytest.approx(shared.compute[i] + attention)
        assert found.compute[i] <= sum(each.compute[i] for each in alone)
    assert found.read == alone[0].read


def test_streamed_weights_are_paid_once_for_a_mixed_pass() -> None:
    """While the drive decides, the answers of others cost a prompt's chunk next to nothing."""
    here = placed(SIZES, smallest_bytes(ram_demand(SIZES, 0)))
    chunk, answers = PassLoad(1, 16, 8), PassLoad(4, 1, 60)
    mixed, first, second = (
        forecast(here, load, PIPELINED).seconds for load in (replace(answers, others=(chunk,)), answers, chunk)
    )
    assert max(first, second) <= mixed < 0.7 * (first + second)


def test_a_model_that_stays_on_the_device_is_one_graph_there() -> None:
    found = predict(placed(SIZES, ROOMY, all_on_device(SIZES)), REQUEST, PIPELINED)
    assert found.decode.seconds == pytest.approx(device_s(decode_load(REQUEST), starts=False) + BETWEEN_PASSES_S)
    assert found.decode.busy[Lane.CPU] == found.decode.busy[Lane.DRIVE] == found.decode.busy[Lane.UPLOAD] == 0


def test_what_stays_on_the_device_is_read_and_copied_once() -> None:
    """It passes through RAM on the way, and its place there is a slot."""
    here = placed(SIZES, ROOMY, all_on_device(SIZES))
    assert not any(here.ram.resident) and here.ram.streamed_bytes == 0
    line = here.line(PIPELINED)
    costs = here.costs(PassLoad(1, 16, 8))
    cold_s, warm_s = line.run_pass(costs), line.run_pass(costs)
    assert cold_s > sum(costs.read.values()) > warm_s


def test_copies_bind_where_the_link_is_slow() -> None:
    """Half of the blocks move in every pass, and the link never rests."""
    slow = replace(WITH_GPU, devices=(WITH_GPU.cpu, replace(GPU, from_host=LinkProfile(1e8))))
    device = all_on_device(SIZES, num_streamed=4)
    found = predict(placed(SIZES, ROOMY, device, slow), REQUEST, PIPELINED)
    assert found.decode.seconds == pytest.approx(device.streamed_bytes / 1e8, rel=0.02)
    assert found.decode.share(Lane.UPLOAD) == pytest.approx(1, abs=0.02)


def test_keys_and_values_in_ram_cross_the_link_in_every_pass() -> None:
    staying, moving = (
        predict(placed(SIZES, ROOMY, all_on_device(SIZES, num_streamed=4, moves_kv=moves)), REQUEST, PIPELINED)
        for moves in (False, True)
    )
    link, load = GPU.from_host, decode_load(REQUEST)
    assert link is not None
    loaded_s = SIZES.num_blocks * link.seconds(load.cached_positions * SIZES.kv_per_position)
    assert moving.decode.busy[Lane.UPLOAD] - staying.decode.busy[Lane.UPLOAD] == pytest.approx(loaded_s, rel=0.01)
    assert moving.decode.busy[Lane.DOWNLOAD] > 0 == staying.decode.busy[Lane.DOWNLOAD]


def test_first_blocks_on_the_cpu_hand_over_once_each_way() -> None:
    """Nothing streams and nothing overlaps: a pass is the CPU's share, the device's and two crossings."""
    half = device_demand(SIZES, limit_bytes=4 * 32 * MIB + SIZES.head + 20 * MIB)
    device = next(place_on_device(half))
    assert [unit.block_idx for unit, on in zip(half.units, device.computes, strict=True) if not on] == sorted(
        [*range(4)] * 2
    )
    here = placed(SIZES, ROOMY, device)
    assert here.on_device == frozenset(range(8, len(shapes(SIZES).stages))), "the final norm goes with the head"
    found = predict(here, REQUEST, PIPELINED)
    costs = here.costs(decode_load(REQUEST))
    expected = sum(costs.compute.values()) + 2 * costs.handover + BETWEEN_PASSES_S
    assert found.decode.seconds == pytest.approx(expected)


def test_residency_of_both_tiers_counts_every_place() -> None:
    device = all_on_device(SIZES, num_streamed=4)
    here = placed(SIZES, 200 * MIB, device)
    residency = residency_of(here.ram, device)
    assert residency.on_device == frozenset(range(len(device.computes)))
    assert residency.device.num_slots == [slots.num_slots for slots in device.slots]
    assert residency.ram.num_slots == [slots.num_slots for slots in here.ram.slots]
    assert len(residency.device.classes) == 8 and len(residency.device.missing) == 9
    attention = [i for i, (role, _, _) in enumerate(SIZES.units) if role is UnitRole.ATTENTION]
    assert {residency.ram.classes[i] for i in residency.ram.classes if i in attention} <= {0}


def test_a_long_prompt_is_predicted_from_some_of_its_passes() -> None:
    """As if all had been simulated: what lies between is interpolated, and little is lost."""
    here = placed(SIZES, 120 * MIB)
    long = Workload(here.ram.chunk.num_tokens * 200, 16)
    found, line = predict(here, long, PIPELINED), here.line(PIPELINED)
    chunk = here.ram.chunk.num_tokens
    exact = sum(line.run_pass(here.costs(PassLoad(1, chunk, i * chunk + chunk / 2))) for i in range(200))
    assert found.ttft_s == pytest.approx(exact, rel=0.02)


def test_more_sequences_share_a_sweep_and_wait_for_each_other_s_prompts() -> None:
    here = placed(SIZES, 120 * MIB)
    one, four = (predict(here, replace(REQUEST, num_sequences=n), PIPELINED) for n in (1, 4))
    assert four.tokens_per_s > 2 * one.tokens_per_s
    assert 3 * one.ttft_s < four.ttft_s < 5 * one.ttft_s


def test_compute_and_the_drive_slow_each_other_while_both_work() -> None:
    """100 ms of reads and 50 of compute: at half its speed, compute is at work all that time."""
    costs = StepCosts({UnitId(0): 0.06, UnitId(1): 0.04, UnitId(2): 9.0}, {0: 0.03, 1: 0.02, 2: 1.0}, on_device={2})
    both = beside_each_other(costs, SharedUse(2, 0.5, 0.8), [UnitId(0), UnitId(1)])
    assert both.compute == pytest.approx({0: 0.06, 1: 0.04, 2: 1.0}), "a device is not disturbed"
    assert both.read[UnitId(0)] == pytest.approx(0.06 * (1 + 0.8 * 0.25))
    assert beside_each_other(costs, SharedUse(2, 0.5, 0.8), []) == costs


def test_what_both_do_to_each_other_counts_where_weights_stream_and_rows_are_few() -> None:
    limit = smallest_bytes(ram_demand(SIZES, 0)) + 64 * MIB
    there = place(ram_demand(SIZES, limit))
    uses = (SharedUse(2, 0.5, 0.8), SharedUse(1, 0.4, 1.0))
    alone = Placed(shapes(SIZES), MACHINE, there)
    shared = replace(alone, machine=replace(MACHINE, shared_uses=uses))
    one, many = PassLoad(1, 1, 100), PassLoad(1, 64, 100)
    assert shared.costs(many) == alone.costs(many)
    assert shared.costs(one).read != alone.costs(one).read
    fewer = replace(shared, decode_threads=1)
    assert fewer.costs(one).read == alone.costs(one).read, "one thread leaves the drive alone"
    assert sum(fewer.costs(one).compute.values()) > sum(shared.costs(one).compute.values())
    resident = replace(shared, ram=place(ram_demand(SIZES, 1 << 40)))
    assert resident.costs(one) == replace(alone, ram=resident.ram).costs(one)
