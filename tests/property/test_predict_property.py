"""Whatever lives where, in two tiers or three: no lane is busy for longer than a pass, and a pass does all its work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.planner.device_placement import DevicePlacement, place_on_device, smallest_vram_bytes
from pipo.planner.placement import smallest_bytes
from pipo.planner.predict import Placed, Workload, decode_load, predict
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane, StepCosts
from tests.support.planned import MIB, Sizes, device_demand, placed, ram_demand

sizes = st.builds(
    Sizes,
    num_blocks=st.integers(1, 8),
    attention=st.integers(1, 16 * MIB),
    mlp=st.integers(1, 48 * MIB),
    head=st.integers(1, 64 * MIB),
    kv_per_position=st.integers(1, 8192),
)
workloads = st.builds(Workload, st.integers(1, 2000), st.integers(1, 200), st.sampled_from((1, 2, 9)))
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@st.composite
def cases(draw: st.DrawFn) -> Placed:
    """Limits between the smallest and all there is; any of the placements worth a look."""
    model, device, num_sequences = draw(sizes), None, draw(st.sampled_from((1, 2, 9)))
    weights = sum(size for _, _, size in model.units)
    if draw(st.booleans()):
        demand = device_demand(model, 0, num_sequences=num_sequences)
        limit = smallest_vram_bytes(demand) + int(1.2 * weights * draw(st.floats(0, 1)))
        device = draw(st.sampled_from(list(place_on_device(replace(demand, limit_bytes=limit)))))
    low = smallest_bytes(ram_demand(model, 0, _staged(device)))
    return placed(model, low + int(1.2 * weights * draw(st.floats(0, 1))), device)


def _staged(device: DevicePlacement | None) -> tuple[bool, ...]:
    return device.resident if device else ()


def times_computed(here: Placed, costs: StepCosts, stage_idx: int) -> int:
    """In a pass: once, or for each micro-batch of sequences whose keys and values move."""
    moves = here.moves_kv and stage_idx in here.on_device and here.shapes.stages[stage_idx].kv_bytes_per_position
    return costs.num_micro_batches if moves else 1


@schedules
@given(cases(), workloads)
@settings(max_examples=40, deadline=None)
def test_lanes_and_work(schedule: str, here: Placed, workload: Workload) -> None:
    found = predict(here, workload, SCHEDULES[schedule])
    costs = here.costs(decode_load(workload))
    assert all(0 <= found.decode.share(lane) <= 1 + 1e-6 for lane in Lane)
    computing = found.decode.busy[Lane.CPU] + found.decode.busy[Lane.DEVICE]
    assert computing == pytest.approx(sum(costs.compute[i] * times_computed(here, costs, i) for i in costs.compute))
    assert found.decode.seconds >= computing * (1 - 1e-9)
    assert found.ttft_s >= here.ram.streamed_bytes / here.machine.drive.bytes_per_s
    assert found.total_s >= found.ttft_s > 0


@given(cases(), workloads)
@settings(max_examples=40, deadline=None)
def test_the_pipeline_is_never_slower_than_one_thing_after_another(here: Placed, workload: Workload) -> None:
    pipelined, sequential = (predict(here, workload, SCHEDULES[name]) for name in ("pipelined", "sequential"))
    assert pipelined.decode.seconds <= sequential.decode.seconds * (1 + 1e-9)


@given(sizes, st.floats(0, 1.3), st.sampled_from((1, 2, 5)))
@settings(max_examples=60, deadline=None)
def test_a_device_s_limit_is_kept_and_used(model: Sizes, share: float, num_sequences: int) -> None:
    """Blocks of one model are alike here: one more that stays would not fit."""
    weights = sum(size for _, _, size in model.units)
    demand = device_demand(model, 0, num_sequences=num_sequences)
    limit = smallest_vram_bytes(demand) + int(weights * share)
    found = list(place_on_device(replace(demand, limit_bytes=limit)))
    assert found and all(each.num_bytes <= limit for each in found)
    block = model.attention + model.mlp + model.kv_per_position * 512 * num_sequences
    for each in found:
        assert each.is_all or each.num_bytes + block > limit
