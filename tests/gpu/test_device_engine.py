"""A model whose stages compute on a device, or on both sides: whatever stays or moves, the logits are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bench.random_model import write_random_model
from pipo.base.config import EngineConfig
from pipo.compute.device import ComputeDevice
from pipo.planner.device_placement import DeviceDemand, DevicePlacement, place_on_device
from pipo.planner.placement import place, smallest_bytes
from pipo.planner.schedule import SCHEDULES
from tests.support.rigs import FloatArray, Rig, transcript

PROMPT, CHUNK, NUM_NEW = list(range(5, 45)), 16, 4
NUM_BLOCKS, ROOMY = 4, 1 << 30


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """F16 weights, plain: both sides multiply from the same numbers."""
    path = tmp_path_factory.mktemp("device") / "smoke.gguf"
    write_random_model(path, "smoke", "f16")
    config = EngineConfig(threads=1, layout="plain", prefill_chunk=CHUNK, cache_type_k="f32", cache_type_v="f32")
    with Rig(path, config) as rig:
        yield rig


@pytest.fixture(scope="module")
def on_cpu(rig: Rig) -> FloatArray:
    with rig.running(rig.all_resident()) as forward:
        return transcript(forward, PROMPT, CHUNK, NUM_NEW)


@pytest.fixture(scope="module")
def whole_device(rig: Rig, device: ComputeDevice) -> FloatArray:
    """All on the device."""
    placement = next(place_on_device(rig.device_demand(device, ROOMY, CHUNK)))
    return run(rig.on_device(device, placement), roomy=True)


def run(rig: Rig, *, roomy: bool, schedule: str = "pipelined") -> FloatArray:
    """With RAM for all that lives there, or with as little as works."""
    demand = rig.demand(1 << 50)
    ram = place(demand if roomy else replace(demand, limit_bytes=smallest_bytes(demand)))
    with rig.running(ram, schedule=schedule) as forward:
        return transcript(forward, PROMPT, CHUNK, NUM_NEW)


def split(
    demand: DeviceDemand, num_streamed: int, num_on_cpu: int, *, moves_kv: bool, at_a_time: int | None = None
) -> DevicePlacement:
    """A placement whose limit leaves so many blocks to the CPU. Keys and values that move do so for so many sequences
    at a time, or for all.
    """
    kv_sequences = (at_a_time or demand.num_sequences) if moves_kv else 0
    for limit in range(demand.limit_bytes // 1000, demand.limit_bytes, 20_000):
        for placement in place_on_device(replace(demand, limit_bytes=limit)):
            on_cpu = NUM_BLOCKS - (sum(placement.computes) - 1) // 2
            streamed = sum(placement.computes) - sum(placement.resident)
            if (streamed // 2, on_cpu, placement.kv_sequences) == (num_streamed, num_on_cpu, kv_sequences):
                return placement
    raise AssertionError("no such placement")


def relative_error(got: FloatArray, want: FloatArray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_device_computes_what_the_cpu_does(whole_device: FloatArray, on_cpu: FloatArray) -> None:
    """F16 weights and F32 keys and values; activations are rounded to F16 (2^-11) in some products of either side."""
    assert relative_error(whole_device, on_cpu) < 16 * 2**-11


@pytest.mark.parametrize("moves_kv", [False, True])
@pytest.mark.parametrize("num_streamed", range(NUM_BLOCKS + 1))
def test_streamed_to_the_device_equals_resident_there(
    rig: Rig, device: ComputeDevice, whole_device: FloatArray, num_streamed: int, moves_kv: bool
) -> None:
    """Bit for bit, from disk through RAM and from RAM, with keys and values that stay or move."""
    demand = rig.device_demand(device, ROOMY, CHUNK)
    placement = split(demand, num_streamed, 0, moves_kv=moves_kv)
    there = rig.on_device(device, placement)
    for roomy in (False, True):
        np.testing.assert_array_equal(run(there, roomy=roomy), whole_device)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("moves_kv", [False, True])
@pytest.mark.parametrize(("num_streamed", "num_on_cpu"), [(0, 1), (1, 2), (2, 1), (3, 0)])
def test_both_sides_share_a_model(
    rig: Rig,
    device: ComputeDevice,
    on_cpu: FloatArray,
    schedule: str,
    moves_kv: bool,
    num_streamed: int,
    num_on_cpu: int,
) -> None:
    placement = split(rig.device_demand(device, ROOMY, CHUNK), num_streamed, num_on_cpu, moves_kv=moves_kv)
    got = run(rig.on_device(device, placement), roomy=False, schedule=schedule)
    assert relative_error(got, on_cpu) < 16 * 2**-11
