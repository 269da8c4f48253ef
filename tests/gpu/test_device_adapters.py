"""Adapters with stages on a device: the same as on the CPU, wherever weights live, and for each sequence its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.random_model import write_random_model
from pipo.base.adapter import AdapterId, NamedAdapter
from pipo.base.clock import RealClock
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget
from pipo.base.trace import NullTracer
from pipo.compute.device import ComputeDevice
from pipo.formats.adapter import open_adapter
from pipo.pipeline.adapters import Weights
from pipo.pipeline.assembly import Assembly
from pipo.pipeline.forward import Forward
from pipo.planner.device_placement import place_on_device
from pipo.planner.placement import place, smallest_bytes
from tests.gpu.test_device_engine import relative_error, split
from tests.support.random_adapters import write_random_adapter
from tests.support.rigs import FloatArray, Rig, read_prompts

CHUNK, NUM_NEW, ROOMY = 16, 3, 1 << 30
PROMPTS = [list(range(5, 45)), [7, 8, 9], list(range(100, 117))]
A, B = AdapterId("a"), AdapterId("b")
WEIGHTS: list[Weights] = [{A: 1.0}, {A: -0.5, B: 1.0}, {}]
TOLERANCE = 32 * 2**-11  # F16 weights on both sides, and products of adapters on top


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("device")
    write_random_model(folder / "smoke.gguf", "smoke", "f16")
    files = [folder / "a.gguf", folder / "b.gguf"]
    for seed, file in enumerate(files):
        write_random_adapter(folder / "smoke.gguf", file, rank=4 * seed + 4, strength=0.5, seed=seed)
    config = EngineConfig(
        threads=1, layout="plain", prefill_chunk=CHUNK, cache_type_k="f32", cache_type_v="f32", num_sequences=3
    )
    with Rig(folder / "smoke.gguf", config) as rig:
        yield rig.with_adapters(*files)


def together(forward: Forward, weights: list[Weights]) -> FloatArray:
    """Greedy answers to all prompts in common passes. Shape: (1 + NUM_NEW, prompts, vocab)."""
    forward.use_adapters(weights)
    rows = [read_prompts(forward, PROMPTS, CHUNK)]
    for i in range(NUM_NEW):
        tokens = [100 + i] * len(PROMPTS)
        rows.append(forward.run_batch(tokens, [len(prompt) + i for prompt in PROMPTS]).copy())
    return np.stack(rows)


def run(rig: Rig, weights: list[Weights], *, roomy: bool = True) -> FloatArray:
    demand = rig.demand(1 << 50)
    ram = place(demand if roomy else rig.demand(smallest_bytes(demand)))
    with rig.running(ram) as forward:
        return together(forward, weights)


@pytest.mark.parametrize("weights", [WEIGHTS, [{}, {}, {}], [{B: 2.0}] * 3], ids=["each", "none", "all"])
def test_device_computes_what_the_cpu_does(rig: Rig, device: ComputeDevice, weights: list[Weights]) -> None:
    placement = next(place_on_device(rig.device_demand(device, ROOMY, CHUNK)))
    got = run(rig.on_device(device, placement), weights)
    want = run(rig, weights)
    assert relative_error(got, want) < TOLERANCE
    if weights is WEIGHTS:
        assert relative_error(run(rig, [{}, {}, {}]), want) > 4 * TOLERANCE


@pytest.mark.parametrize(("num_streamed", "num_on_cpu", "moves_kv"), [(4, 0, False), (1, 2, False), (2, 1, True)])
def test_streamed_and_shared(
    rig: Rig, device: ComputeDevice, num_streamed: int, num_on_cpu: int, moves_kv: bool
) -> None:
    """Bit for bit where all computes there, and within rounding where the CPU computes some blocks."""
    demand = rig.device_demand(device, ROOMY, CHUNK)
    got = run(rig.on_device(device, split(demand, num_streamed, num_on_cpu, moves_kv=moves_kv)), WEIGHTS, roomy=False)
    if num_on_cpu:
        assert relative_error(got, run(rig, WEIGHTS)) < TOLERANCE
    else:
        np.testing.assert_array_equal(got, run(rig.on_device(device, next(place_on_device(demand))), WEIGHTS))


def test_added_between_passes(rig: Rig, device: ComputeDevice, tmp_path: Path) -> None:
    """On both sides; where the device's limit has no room for it nothing changes."""
    placement = next(place_on_device(rig.device_demand(device, ROOMY, CHUNK)))
    there = rig.on_device(device, placement)
    assert there.blueprint.device is not None
    path = write_random_adapter(rig.blueprint.manifest.files[0], tmp_path / "c.gguf", rank=2, strength=0.5, seed=9)
    named = NamedAdapter(AdapterId("c"), open_adapter(path), 1.0)
    ram = place(there.demand(1 << 50))
    assembly = Assembly(there.blueprint, ram, there.context_tokens, 1 << 30, RealClock(), NullTracer())
    try:
        before, held = together(assembly.forward, WEIGHTS), assembly.ledger.breakdown()
        with pytest.raises(OverBudget, match="--vram"):
            assembly.add_adapter(named)
        assert assembly.ledger.breakdown() == held and list(assembly.adapters) == [A, B]
        np.testing.assert_array_equal(together(assembly.forward, WEIGHTS), before)
        assembly.remove_adapter(B)
        assembly.add_adapter(named)
        got = together(assembly.forward, [{AdapterId("c"): 1.0}] * 3)
    finally:
        assembly.close()
    assert assembly.ledger.in_use_bytes == 0
    want = run(rig.with_adapters(path), [{AdapterId("c"): 1.0}] * 3)
    assert relative_error(got, want) < TOLERANCE
