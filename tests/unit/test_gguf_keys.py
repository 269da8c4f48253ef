"""What a folder's config.json says as keys of a GGUF; what these cannot say is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Manifest
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.gguf_keys import hyper_parameter_keys
from tests.support.hf_bytes import write_folder
from tests.support.hf_folders import edit_json, save_folder
from tests.support.tiny_models import SPECS, make_model


def folder_of(name: str, home: Path, **changes: Any) -> Manifest:
    folder = save_folder(make_model(SPECS[name]), home / "tiny")
    edit_json(folder / "config.json", **changes)
    return open_checkpoint(folder).manifest


def test_a_llama(tmp_path: Path) -> None:
    assert hyper_parameter_keys(open_checkpoint(write_folder(tmp_path / "tiny")).manifest) == {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.vocab_size": 320,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
    }


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
         {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64,
          "scaling.attn_factor": pytest.approx(1.3 / 1.1386294), "scaling.yarn_beta_fast": 32.0,
          "scaling.yarn_beta_slow": 1.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"scaling.type": "linear", "scaling.factor": 2.0}),
        ({"rope_type": "linear", "factor": 1.0}, {}),
    ],
)  # fmt: skip
def test_scaled_rope(table: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    keys = hyper_parameter_keys(open_checkpoint(write_folder(tmp_path / "tiny", rope_scaling=table)).manifest)
    prefix = "llama.rope."
    found = {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(f"{prefix}scaling")}
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "its unrotated layers is (False, False, True, False, False)"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "its attention scale is 0.1, which a GGUF of architecture gemma2"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "its sliding layers is"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1, "layer_types": None},
         "its sliding window is 40, which a GGUF of architecture qwen2 cannot say"),
    ],
)  # fmt: skip
def test_what_readers_would_take_for_something_else(
    name: str, changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    manifest = folder_of(name, tmp_path, **changes)
    with pytest.raises(UnsupportedModel) as refused:
        hyper_parameter_keys(manifest)
    assert what in str(refused.value) and "its readers would take" in str(refused.value)


def test_a_window_that_hides_nothing(tmp_path: Path) -> None:
    """llama.cpp has a window of its own for a Gemma 2 that names none."""
    manifest = folder_of("gemma2", tmp_path, sliding_window=300)
    assert manifest.hyper.sliding_window == 0
    assert hyper_parameter_keys(manifest)["gemma2.attention.sliding_window"] == 256


@pytest.mark.parametrize("field", ["norm_epsilon", "final_softcap"])
def test_a_number_that_changed_on_the_way_is_seen(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_checkpoint(write_folder(tmp_path / "tiny")).manifest
    other = replace(manifest.hyper, **{field: 0.5})
    monkeypatch.setattr("pipo.formats.gguf_keys.read_hyper_parameters", lambda metadata, tensors: (other, {}))
    with pytest.raises(UnsupportedModel, match=field.replace("_", " ")):
        hyper_parameter_keys(manifest)
