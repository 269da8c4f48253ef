"""Families whose ops differ from a Llama's, all on a device: what transformers computes, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipo.base.config import EngineConfig
from pipo.compute.device import ComputeDevice
from pipo.planner.device_placement import DevicePlacement, place_on_device
from pipo.planner.placement import place
from tests.gpu.test_device_engine import relative_error
from tests.support.rigs import FloatArray, Rig, all_logits
from tests.support.tiny_models import SPECS, make_model, reference_logits, write_gguf

CHUNK, ROOMY = 24, 1 << 30
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, SPECS["llama"].vocab_size, 90)]
MAX_ERROR = 1e-2  # a device may round what it multiplies to F16: 2^-11, in up to seven blocks


@pytest.fixture(scope="module", params=["gemma2", "gemma3", "opt", "phi3", "smollm3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, family: str) -> Iterator[Rig]:
    path = tmp_path_factory.mktemp("device") / f"{family}.gguf"
    write_gguf(make_model(SPECS[family]), path)
    config = EngineConfig(threads=1, prefill_chunk=CHUNK, max_outputs=CHUNK, cache_type_k="f32", cache_type_v="f32")
    with Rig(path, config) as rig:
        yield rig


def answer(rig: Rig, device: ComputeDevice, placement: DevicePlacement) -> FloatArray:
    there = rig.on_device(device, placement)
    with there.running(place(there.demand(1 << 50))) as forward:
        return all_logits(forward, TOKENS, CHUNK)


def test_a_device_computes_what_transformers_does(rig: Rig, device: ComputeDevice, family: str) -> None:
    placements = [each for each in place_on_device(rig.device_demand(device, ROOMY, CHUNK)) if each.is_all]
    resident = answer(rig, device, placements[0])
    assert relative_error(resident, reference_logits(make_model(SPECS[family]), TOKENS)) < MAX_ERROR
    np.testing.assert_array_equal(answer(rig, device, placements[-1]), resident)
