"""Hugging Face folders on a device: vectors are made before they go there, experts in many files stay the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgufType

from pipo.base.config import EngineConfig
from pipo.compute.device import ComputeDevice
from pipo.planner.device_placement import DevicePlacement, place_on_device
from pipo.planner.placement import place
from tests.gpu.test_device_engine import relative_error
from tests.support.hf_folders import save_folder
from tests.support.rigs import FloatArray, Rig, all_logits
from tests.support.tiny_models import SPECS, make_model, write_gguf

CHUNK, ROOMY = 24, 1 << 30
TOKENS = [int(t) for t in np.random.default_rng(6).integers(3, SPECS["llama"].vocab_size, 60)]
CONFIG = EngineConfig(threads=1, prefill_chunk=CHUNK, max_outputs=CHUNK, cache_type_k="f32", cache_type_v="f32")


def answer(rig: Rig, device: ComputeDevice, placement: DevicePlacement) -> FloatArray:
    there = rig.on_device(device, placement)
    with there.running(place(there.demand(1 << 50))) as forward:
        return all_logits(forward, TOKENS, CHUNK)


def answers(path: Path, device: ComputeDevice) -> list[FloatArray]:
    """With all weights on the device, and with all that passes through it."""
    with Rig(path, CONFIG) as rig:
        placements = [each for each in place_on_device(rig.device_demand(device, ROOMY, CHUNK)) if each.is_all]
        return [answer(rig, device, each) for each in (placements[0], placements[-1])]


@pytest.mark.parametrize("name", ["gemma3", "phi3", "qwen3moe"])
def test_the_answer_of_the_same_model_as_gguf(name: str, device: ComputeDevice, tmp_path: Path) -> None:
    save_folder(make_model(SPECS[name]), tmp_path / name, torch.float16, max_shard_size="60KB")
    write_gguf(make_model(SPECS[name]).half().float(), tmp_path / "model.gguf", GgufType.F16)
    resident, streamed = answers(tmp_path / name, device)
    assert relative_error(resident, answers(tmp_path / "model.gguf", device)[0]) < 1e-5
    np.testing.assert_array_equal(resident, streamed)
