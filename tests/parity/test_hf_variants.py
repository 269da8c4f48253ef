"""Ways in which folders of the same model differ: none of them changes what is computed."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipo.base.errors import MalformedFile, UnsupportedModel
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.hf_folders import save_folder
from tests.support.tiny_models import SPECS, FloatArray, TinySpec, make_model, reference_logits

MAX_ERROR = 1e-4
NUM_TOKENS = 100
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "max_outputs": 33, "prefill_chunk": 33}
TOKENS = [int(token) for token in np.random.default_rng(4).integers(3, 320, NUM_TOKENS)]


def logits_of(folder: Path, **settings: Any) -> FloatArray:
    with start_engine(folder, **{**EXACT, **settings}) as engine:
        return engine.logits(TOKENS)


def saved(spec: TinySpec, folder: Path) -> Path:
    return save_folder(make_model(spec), folder)


def edit_config(folder: Path, take: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name not in take}
    path.write_text(json.dumps(fields | changes))


def assert_same_bits(ours: FloatArray, theirs: FloatArray) -> None:
    assert np.isfinite(ours).all() and ours.std() > 0.1
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def assert_like_transformers(model: PreTrainedModel, folder: Path) -> None:
    want = reference_logits(model, TOKENS)
    got = logits_of(save_folder(model, folder))
    assert float((np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)).max()) < MAX_ERROR


@pytest.mark.parametrize("name", ["llama-linear", "llama-yarn", "llama-llama3"])
def test_rope_in_the_old_spelling(name: str, tmp_path: Path) -> None:
    folder = saved(SPECS[name], tmp_path / name)
    new = logits_of(folder)
    scaling = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    edit_config(folder, ("rope_parameters",), rope_theta=theta, rope_scaling=scaling)
    assert_same_bits(logits_of(folder), new)


def test_gemma3_in_the_old_spelling(tmp_path: Path) -> None:
    folder = saved(SPECS["gemma3"], tmp_path / "gemma3")
    new = logits_of(folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    full, local = rope["full_attention"], rope["sliding_attention"]
    edit_config(
        folder,
        ("rope_parameters", "layer_types"),
        rope_theta=full.pop("rope_theta"),
        rope_local_base_freq=local["rope_theta"],
        rope_scaling=full,
        sliding_window_pattern=6,
    )
    assert_same_bits(logits_of(folder), new)


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "more",
    [
        {"attention_factor": 1.3},
        {"mscale": 0.7, "mscale_all_dim": 1.5},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"beta_fast": 8.0, "beta_slow": 2.0},
    ],
)
def test_yarn(more: dict[str, float], tmp_path: Path) -> None:
    assert_like_transformers(make_model(TinySpec(rope_scaling={**_YARN, **more}, seed=31)), tmp_path / "yarn")


@pytest.mark.parametrize("family", ["mixtral", "mistral"])
def test_sliding_windows(family: Any, tmp_path: Path) -> None:
    folder, model = tmp_path / family, make_model(TinySpec(family=family, seed=32))
    model.config.sliding_window = 40
    assert_like_transformers(model, folder)
    whole = logits_of(folder)
    edit_config(folder, sliding_window=None)
    assert np.abs(logits_of(folder) - whole).max() > 0.01, "the window does not show"


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2moe", "qwen3moe"])
def test_experts_in_one_tensor(name: str, tmp_path: Path) -> None:
    """As transformers has them in memory, and some files too: gate and up of all experts in one tensor."""
    folder = saved(SPECS[name], tmp_path / name)
    apart = logits_of(folder)
    weights = {key: value.contiguous() for key, value in make_model(SPECS[name]).state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in weights)
    save_file(weights, folder / "model.safetensors")
    assert_same_bits(logits_of(folder), apart)
    smallest = smallest_ram_bytes(folder, **EXACT)
    assert_same_bits(logits_of(folder, ram_bytes=smallest), apart)


def test_experts_that_would_need_a_transpose(tmp_path: Path) -> None:
    folder = saved(SPECS["qwen3moe"], tmp_path / "model")
    weights = {
        key: (value.transpose(1, 2) if ".experts." in key else value).contiguous()
        for key, value in make_model(SPECS["qwen3moe"]).state_dict().items()
    }
    save_file({k: v for k, v in weights.items() if not k.endswith("gate_up_proj")}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"experts\.down_proj' has shape .* transposed, which would need a copy"):
        logits_of(folder)


@pytest.mark.parametrize("changes", [{"num_local_experts": 6}, {"num_local_experts": 20}])
def test_another_number_of_experts(changes: dict[str, int], tmp_path: Path) -> None:
    folder = saved(replace(SPECS["qwen3moe"], num_experts=8), tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(MalformedFile, match=r"has 8 experts, config\.json says"):
        logits_of(folder)


@pytest.mark.parametrize("num_spaces", [1, 3, 4090])
def test_data_that_begins_anywhere(num_spaces: int, tmp_path: Path) -> None:
    """Writers align it to 8 bytes today; the format does not ask for it."""
    folder = saved(SPECS["qwen2moe"], tmp_path / "model")
    aligned = logits_of(folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length] + b" " * num_spaces
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    assert_same_bits(logits_of(folder), aligned)
    assert_same_bits(logits_of(folder, ram_bytes=smallest_ram_bytes(folder, **EXACT)), aligned)
