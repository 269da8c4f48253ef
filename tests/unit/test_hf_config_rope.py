"""config.json: rotary embeddings in both spellings, and what of them is refused by name."""

from __future__ import annotations

from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest

from pipo.base.errors import MalformedFile, ModelError, UnsupportedModel
from pipo.base.manifest import RopeScaling
from tests.support.hf_changes import changed_hyper as hyper
from tests.support.hf_changes import read_changed as read


def test_old_and_new_spelling_of_rope_mean_the_same(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    old = hyper(tmp_path, rope_theta=5e5, rope_scaling={**scaling, "type": "yarn"})
    older = hyper(tmp_path, rope_theta=5e5, rope_scaling={"type": "yarn", **{k: scaling[k] for k in list(scaling)[1:]}})
    new = hyper(tmp_path, rope_theta=..., rope_parameters={**scaling, "rope_theta": 5e5})
    assert old == new == older and new.rope.base == 5e5 and new.rope.scaling is RopeScaling.YARN


def test_yarn(tmp_path: Path) -> None:
    """ggml multiplies attn_factor by 1 + 0.1 ln(factor)."""
    base = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

    def rope(**more: Any) -> Any:
        return hyper(tmp_path, rope_scaling={**base, **more}).rope

    ours = 1 + 0.1 * log(4)
    plain = rope()
    assert (plain.factor, plain.original_context_tokens, plain.ext_factor, plain.attn_factor) == (4, 32, 1, 1)
    assert rope(attention_factor=1.5).attn_factor == pytest.approx(1.5 / ours)
    assert rope(mscale=1.0, mscale_all_dim=1.0).attn_factor == pytest.approx(1 / ours)
    assert rope(mscale=0.5, mscale_all_dim=2.0).attn_factor == pytest.approx(
        (1 + 0.05 * log(4)) / (1 + 0.2 * log(4)) / ours
    )
    assert (rope(beta_fast=16, beta_slow=2).beta_fast, rope(beta_fast=16, beta_slow=2).beta_slow) == (16, 2)
    with pytest.raises(UnsupportedModel, match=r"field 'rope_scaling\.truncate' is False"):
        rope(truncate=False)


def test_llama3(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = read(tmp_path, rope_theta=20.0, rope_scaling=scaling)
    divisors = model.vectors["rope_freqs.weight"]
    assert model.hyper.rope.scaling is RopeScaling.FREQ_FACTORS and len(divisors) == 4
    assert divisors[0] == divisors[1] == 1 < divisors[2] < divisors[3] < 8
    assert read(tmp_path, rope_theta=1e6, rope_scaling=scaling).vectors["rope_freqs.weight"][-1] == 8
    with pytest.raises(MalformedFile, match=r"'rope_scaling\.high_freq_factor' is 1"):
        read(tmp_path, rope_scaling={**scaling, "high_freq_factor": 1.0})


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi3(kind: str, tmp_path: Path) -> None:
    model = read(
        tmp_path,
        model_type="phi3",
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_scaling={**LONGROPE, "type": kind},
        sliding_window=None,
    )
    rope = model.hyper.rope
    assert (rope.scaling, rope.original_context_tokens) == (RopeScaling.LONGROPE, 1024)
    assert rope.attn_factor == pytest.approx(sqrt(1 + log(4) / log(1024)))
    assert model.vectors["rope_factors_long.weight"] == (2, 3, 4, 5)
    assert model.vectors["rope_factors_short.weight"] == (1, 1, 1, 1)


def test_phi3_rotates_a_part(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    rope = hyper(tmp_path, model_type="phi3", partial_rotary_factor=0.75, rope_scaling={**LONGROPE, **factors}).rope
    assert rope.num_dims == 6
    with pytest.raises(UnsupportedModel, match=r"'partial_rotary_factor' is 0\.5"):
        read(tmp_path, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, UnsupportedModel, "rope type 'dynamic' is not implemented"),
        ({"rope_type": "proportional"}, UnsupportedModel, "rope type 'proportional'"),
        ({"type": "mrope", "mrope_section": [1]}, UnsupportedModel, "rope type 'mrope'"),
        ({"rope_type": "linear"}, MalformedFile, r"'rope_scaling\.factor' is missing"),
        ({"rope_type": "linear", "factor": 0.5}, MalformedFile, r"'rope_scaling\.factor' is 0\.5"),
        ({"rope_type": "linear", "factor": 2.0, "extra": 1}, UnsupportedModel, r"'rope_scaling\.extra' = 1"),
        ({**LONGROPE, "short_factor": [10**400] * 4}, MalformedFile, "wanted 4 numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, MalformedFile, "wanted 4 numbers"),
        ([1], MalformedFile, "'rope_scaling' is .*, wanted a table"),
    ],
)
def test_rope_that_is_refused(scaling: object, error: type[ModelError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, rope_scaling=scaling)
