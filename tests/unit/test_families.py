"""What files of each family may say, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipo.base.errors import MalformedFile, PipoError, UnsupportedModel
from pipo.base.manifest import HyperParameters, Manifest, RopeScaling
from pipo.base.tensor_type import TensorType
from pipo.formats.checkpoint import open_checkpoint
from pipo.models.registry import FAMILIES, check_architecture, stages_of
from tests.support import tiny_families
from tests.support.gguf_bytes import (
    BOOL,
    F32,
    GgufBytes,
    array_key,
    count_key,
    float_key,
    tensor,
    text_key,
    write,
)
from tests.support.tiny_models import SPECS, make_model, write_gguf


@pytest.fixture(scope="module", params=tiny_families.NAMES)
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("family") / f"{request.param}.gguf"
    write_gguf(make_model(SPECS[request.param]), path)
    return open_checkpoint(path).manifest


def test_every_tensor_is_needed_and_named_when_it_is_missing(manifest: Manifest) -> None:
    stages_of(manifest)
    for name in manifest.tensors:
        if name.endswith(".bias") and "norm" not in name:
            continue  # a model without it would be another one, and sound
        rest = {key: spec for key, spec in manifest.tensors.items() if key != name}
        if name == "output.weight":
            stages_of(replace(manifest, tensors=rest))  # tied, then
            continue
        asked_for = name.replace(".", r"\.").replace("attn_qkv", "attn_q(kv)?")
        with pytest.raises(PipoError, match=asked_for):
            stages_of(replace(manifest, tensors=rest))


def test_a_matrix_of_another_shape_is_named(manifest: Manifest) -> None:
    for name, spec in manifest.tensors.items():
        wrong = replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] + 1))
        with pytest.raises(MalformedFile, match=rf"{name} has shape .*wanted"):
            stages_of(replace(manifest, tensors={**manifest.tensors, name: wrong}))


def test_one_tensor_more_is_refused(manifest: Manifest) -> None:
    spec = next(iter(manifest.tensors.values()))
    more = {**manifest.tensors, "blk.0.attn_sinks.weight": replace(spec, name="blk.0.attn_sinks.weight")}
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_sinks\.weight"):
        stages_of(replace(manifest, tensors=more))


def test_a_vector_in_half_precision_is_refused(manifest: Manifest) -> None:
    name = "output_norm.weight"
    half = replace(manifest.tensors[name], type=TensorType.F16)
    with pytest.raises(UnsupportedModel, match="vectors must be F32"):
        stages_of(replace(manifest, tensors={**manifest.tensors, name: half}))


def test_an_unknown_architecture_hears_of_those_there_are() -> None:
    with pytest.raises(UnsupportedModel, match="'mamba' is not implemented") as caught:
        check_architecture("model", "mamba")
    assert all(name in str(caught.value.hint) for name in FAMILIES)


def hyper_of(tmp_path: Path, architecture: str, *keys: bytes, num_layers: int = 12) -> HyperParameters:
    """From keys alone."""
    counts = {
        "block_count": num_layers, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
        "context_length": 8192, "vocab_size": 4,
    }  # fmt: skip
    own = [count_key(f"{architecture}.{name}", count) for name, count in counts.items()]
    named = [text_key("general.architecture", architecture)]
    epsilon = [float_key(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)]
    some = [tensor("token_embd.weight", (64, 4), F32, 0)]
    file = GgufBytes([*named, *own, *epsilon, *keys], some, bytes(1024))
    return open_checkpoint(write(tmp_path, bytes(file))).manifest.hyper


def sliding(hyper: HyperParameters) -> list[int]:
    return [i for i, slides in enumerate(hyper.sliding_layers) if slides]


def test_layers_slide_by_the_architecture(tmp_path: Path) -> None:
    gemma2 = hyper_of(tmp_path, "gemma2")
    assert gemma2.sliding_window == 4096 and sliding(gemma2) == [0, 2, 4, 6, 8, 10]
    gemma3 = hyper_of(tmp_path, "gemma3", count_key("gemma3.attention.sliding_window", 512))
    assert gemma3.sliding_window == 512 and sliding(gemma3) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert gemma3.local_rope is not None and gemma3.local_rope.base == 10_000
    phi3 = hyper_of(tmp_path, "phi3", count_key("phi3.attention.sliding_window", 2047))
    assert sliding(phi3) == list(range(12))
    longer = hyper_of(tmp_path, "phi3", count_key("phi3.attention.sliding_window", 262_144))
    assert longer.sliding_window == 0 and not longer.sliding_layers, "a window longer than the context"


def test_layers_slide_as_the_file_says(tmp_path: Path) -> None:
    window = count_key("gemma3.attention.sliding_window", 512)
    period = hyper_of(tmp_path, "gemma3", window, count_key("gemma3.attention.sliding_window_pattern", 3))
    assert sliding(period) == [0, 1, 3, 4, 6, 7, 9, 10]
    flags = [bytes([i == 5]) for i in range(12)]
    listed = hyper_of(tmp_path, "gemma3", window, array_key("gemma3.attention.sliding_window_pattern", BOOL, flags))
    assert sliding(listed) == [5]
    with pytest.raises(MalformedFile, match="an array of 3, wanted a flag for each of 12 layers"):
        short = array_key("gemma3.attention.sliding_window_pattern", BOOL, flags[:3])
        hyper_of(tmp_path, "gemma3", window, short)


def test_scores_are_scaled_and_capped(tmp_path: Path) -> None:
    gemma2 = hyper_of(tmp_path, "gemma2", float_key("gemma2.attn_logit_softcapping", 30.0))
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (30.0, 30.0)
    assert gemma2.attention_scale is None and gemma2.embedding_scale == gemma2.hidden_size**0.5
    largest = hyper_of(tmp_path, "gemma2", num_layers=46)
    assert largest.attention_scale == pytest.approx((largest.hidden_size / largest.num_q_heads) ** -0.5)
    assert hyper_of(tmp_path, "gemma3").final_softcap == 0.0
    with pytest.raises(MalformedFile, match="softcapping"):
        hyper_of(tmp_path, "gemma2", float_key("gemma2.final_logit_softcapping", float("nan")))


def test_long_contexts_want_both_factors(tmp_path: Path) -> None:
    path = tmp_path / "phi3.gguf"
    write_gguf(make_model(SPECS["phi3"]), path)
    manifest = open_checkpoint(path).manifest
    rope = manifest.hyper.rope
    assert rope.scaling is RopeScaling.LONGROPE and rope.num_dims == 8
    assert not rope.at(64).is_for_long and rope.at(65).is_for_long
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        rest = {key: spec for key, spec in manifest.tensors.items() if key != name}
        with pytest.raises(MalformedFile, match=name.replace(".", r"\.")):
            stages_of(replace(manifest, tensors=rest))
