"""formats.checkpoint: GGUF keys → hyper-parameters, with llama.cpp's defaults; one refusal per way to be wrong."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest

from pipo.base.errors import MalformedFile, ModelError, UnsupportedModel
from pipo.base.manifest import HyperParameters, Manifest, Rope, RopeLayout, RopeScaling
from pipo.formats.checkpoint import open_checkpoint
from pipo.model_file import ModelFile
from pipo.models.registry import FAMILIES
from tests.support.gguf_bytes import (
    BOOL,
    F32,
    FLOAT32,
    Q4_0,
    STRING,
    UINT32,
    GgufBytes,
    array_key,
    count_key,
    float_key,
    key,
    llama_keys,
    string,
    tensor,
    text_key,
    u32,
)

LLAMA_ROPE = Rope(num_dims=16, base=10_000.0, original_context_tokens=256, ext_factor=0.0)


def open_manifest(folder: Path, file: GgufBytes, name: str = "model.gguf") -> Manifest:
    path = folder / name
    path.write_bytes(bytes(file))
    return open_checkpoint(path).manifest


def open_keys(folder: Path, *more: bytes, **changes: bytes | None) -> Manifest:
    return open_manifest(folder, GgufBytes([*llama_keys(**changes), *more]))


def open_rope(folder: Path, *more: bytes) -> Rope:
    return open_keys(folder, *more).hyper.rope


def test_a_small_llama(tmp_path: Path) -> None:
    manifest = open_keys(tmp_path)
    assert manifest.hyper == HyperParameters(
        architecture="llama",
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=4,
        context_tokens=256,
        norm_epsilon=struct.unpack("<f", struct.pack("<f", 1e-5))[0],
        rope=LLAMA_ROPE,
    )
    assert manifest.extra == {} and manifest.name == "model" and manifest.files == (tmp_path / "model.gguf",)


def test_the_real_file(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    manifest, hyper = checkpoint.manifest, checkpoint.manifest.hyper
    assert (hyper.hidden_size, hyper.intermediate_size, hyper.num_layers, hyper.vocab_size) == (576, 1536, 30, 49152)
    assert (hyper.num_q_heads, hyper.num_kv_heads, hyper.head_dim, hyper.context_tokens) == (9, 3, 64, 8192)
    assert hyper.rope == Rope(num_dims=64, base=100_000.0, original_context_tokens=8192, ext_factor=0.0)
    assert len(manifest.tensors) == 272 and manifest.num_bytes == 96_576_768 and manifest.extra == {}
    assert len(checkpoint.metadata.strings("tokenizer.ggml.tokens")) == 49152
    assert "<|im_start|>" in (checkpoint.metadata.text("tokenizer.chat_template") or "")


def test_the_name(tmp_path: Path) -> None:
    assert open_keys(tmp_path, text_key("general.name", "Small Llama")).name == "Small Llama"
    assert open_keys(tmp_path, text_key("general.name", "\x1b[2J")).name == "model"


def test_defaults_and_given_values(tmp_path: Path) -> None:
    assert open_keys(tmp_path, head_count_kv=None).hyper.num_kv_heads == 4
    wide = open_keys(
        tmp_path, count_key("llama.attention.key_length", 32), count_key("llama.attention.value_length", 32)
    )
    assert (wide.hyper.head_dim, wide.hyper.rope.num_dims) == (32, 32)
    assert open_rope(tmp_path, count_key("llama.rope.dimension_count", 8)).num_dims == 8
    assert open_rope(tmp_path, float_key("llama.rope.freq_base", 500_000.0)).base == 500_000.0
    plain_norm = open_keys(tmp_path, float_key("llama.attention.layer_norm_epsilon", 0.25), rms_epsilon=None)
    assert plain_norm.hyper.norm_epsilon == 0.25


def test_where_the_vocabulary_size_comes_from(tmp_path: Path) -> None:
    assert open_keys(tmp_path, count_key("llama.vocab_size", 7)).hyper.vocab_size == 7
    embedding = GgufBytes(llama_keys(tokens=None), [tensor("token_embd.weight", (64, 5))], bytes(64 * 5 * 4))
    assert open_manifest(tmp_path, embedding).hyper.vocab_size == 5
    with pytest.raises(MalformedFile, match=r"'llama.vocab_size' is missing, wanted it, or tokenizer.ggml.tokens"):
        open_keys(tmp_path, tokens=None)


@pytest.mark.parametrize("architecture", ["mamba", "gemma", "rwkv9" * 1000])
def test_an_architecture_of_no_family_is_refused_before_its_keys(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(GgufBytes([text_key("general.architecture", architecture)])))
    with pytest.raises(UnsupportedModel, match=f"architecture '{architecture[:60]}.* is not implemented") as caught:
        ModelFile(path)
    assert caught.value.hint == f"pipo runs: {', '.join(sorted(FAMILIES))}" and len(caught.value.message) < 200


def test_linear_scaling_and_its_old_name(tmp_path: Path) -> None:
    factor, linear = float_key("llama.rope.scaling.factor", 4.0), text_key("llama.rope.scaling.type", "linear")
    wanted = Rope(16, 10_000.0, RopeLayout.NORMAL, RopeScaling.LINEAR, 4.0, 256, ext_factor=0.0)
    assert open_rope(tmp_path, linear, factor) == wanted
    assert open_rope(tmp_path, factor) == wanted  # linear is what llama.cpp takes a missing type for
    assert open_rope(tmp_path, float_key("llama.rope.scale_linear", 4.0)) == wanted
    assert open_rope(tmp_path, float_key("llama.rope.scale_linear", 9.0), factor) == wanted
    assert open_rope(tmp_path, linear) == LLAMA_ROPE
    assert open_rope(tmp_path, float_key("llama.rope.scaling.factor", 0.0)) == LLAMA_ROPE
    assert open_rope(tmp_path, factor, text_key("llama.rope.scaling.type", "none")) == LLAMA_ROPE


YARN = text_key("llama.rope.scaling.type", "yarn"), float_key("llama.rope.scaling.factor", 4.0)


def test_yarn_as_llama_cpp_passes_it_on(tmp_path: Path) -> None:
    plain = Rope(16, 10_000.0, RopeLayout.NORMAL, RopeScaling.YARN, 4.0, 256, 1.0, 1.0, 32.0, 1.0)
    assert open_rope(tmp_path, *YARN) == plain
    assert open_rope(tmp_path, *YARN, float_key("llama.rope.scaling.yarn_ext_factor", -1.0)) == plain
    full = open_rope(
        tmp_path,
        *YARN,
        count_key("llama.rope.scaling.original_context_length", 64),
        float_key("llama.rope.scaling.attn_factor", 0.5),
        float_key("llama.rope.scaling.yarn_ext_factor", 0.75),
        float_key("llama.rope.scaling.yarn_beta_fast", 8.0),
        float_key("llama.rope.scaling.yarn_beta_slow", 2.0),
        key("llama.rope.scaling.finetuned", BOOL, b"\1"),
    )
    assert full == Rope(16, 10_000.0, RopeLayout.NORMAL, RopeScaling.YARN, 4.0, 64, 0.5, 0.75, 8.0, 2.0)


def test_yarn_magnitudes(tmp_path: Path) -> None:
    """What ggml multiplies by in all: attn_factor, and 1 + 0.1 ln(factor) where ext_factor is not 0."""
    with_log = open_rope(tmp_path, *YARN, float_key("llama.rope.scaling.yarn_log_multiplier", 1.0))
    assert with_log.attn_factor * (1 + 0.1 * math.log(4)) == pytest.approx(1.0)
    no_mix = (
        float_key("llama.rope.scaling.yarn_ext_factor", 0.0),
        float_key("llama.rope.scaling.yarn_attn_factor", 1.25),
    )
    assert open_rope(tmp_path, *YARN, *no_mix).attn_factor == 1.25
    with pytest.raises(UnsupportedModel, match=r"'llama.rope.scaling.yarn_attn_factor' is 1.25, wanted 1"):
        open_rope(tmp_path, *YARN, no_mix[1])


def open_with_freqs(folder: Path, *more: bytes, tensor_type: int = F32, num_freqs: int = 8) -> Rope:
    tensors = [tensor("rope_freqs.weight", (num_freqs,), tensor_type)]
    return open_manifest(folder, GgufBytes([*llama_keys(), *more], tensors, bytes(64))).hyper.rope


def test_frequency_factors(tmp_path: Path) -> None:
    assert open_with_freqs(tmp_path) == Rope(
        16, 10_000.0, RopeLayout.NORMAL, RopeScaling.FREQ_FACTORS, 1.0, 256, ext_factor=0.0
    )
    with pytest.raises(MalformedFile, match=r"'rope_freqs.weight' is F32 \(4,\), wanted F32 \(8,\)"):
        open_with_freqs(tmp_path, num_freqs=4)
    with pytest.raises(MalformedFile, match=r"'rope_freqs.weight' is Q4_0 \(32,\), wanted F32"):
        open_with_freqs(tmp_path, tensor_type=Q4_0, num_freqs=32)
    with pytest.raises(UnsupportedModel, match="and rope scaling 'yarn'"):
        open_with_freqs(tmp_path, *YARN)


def test_one_value_for_each_layer(tmp_path: Path) -> None:
    def ints(name: str, *values: int) -> bytes:
        return array_key(name, UINT32, [u32(value) for value in values])

    assert open_keys(tmp_path, head_count_kv=ints("llama.attention.head_count_kv", 2, 2)).hyper.num_kv_heads == 2
    with pytest.raises(UnsupportedModel, match=r"'llama.attention.head_count_kv' differs between layers \(2 to 4\)"):
        open_keys(tmp_path, head_count_kv=ints("llama.attention.head_count_kv", 2, 4))
    with pytest.raises(MalformedFile, match=r"is an array of 3 UINT32, wanted an integer, or one for each of 2 layers"):
        open_keys(tmp_path, head_count_kv=ints("llama.attention.head_count_kv", 2, 2, 2))
    with pytest.raises(MalformedFile, match="is 0, wanted a count from 1"):
        open_keys(tmp_path, head_count_kv=ints("llama.attention.head_count_kv", 0, 0))
    with pytest.raises(MalformedFile, match="is an array of 2 UINT32, wanted an integer"):
        open_keys(tmp_path, embedding_length=ints("llama.embedding_length", 64, 64))


def test_what_no_field_holds_is_extra(tmp_path: Path) -> None:
    manifest = open_keys(
        tmp_path,
        count_key("llama.expert_group_count", 8),
        text_key("llama.remark", "x"),
        array_key("llama.rope.dimension_sections", UINT32, [u32(1), u32(2)]),
        array_key("llama.labels", STRING, [string("a")]),
        float_key("llama.rope.scaling.yarn_beta_fast", 8.0),  # without YaRN nobody takes it
        count_key("other.expert_count", 9),
    )
    assert manifest.extra == {
        "expert_group_count": 8,
        "remark": "x",
        "rope.dimension_sections": (1, 2),
        "labels": ("a",),
        "rope.scaling.yarn_beta_fast": 8.0,
    }
    many = [array_key(f"llama.many{idx}", FLOAT32, [bytes(4 * 150_000)], count=150_000) for idx in range(2)]
    assert len(open_keys(tmp_path, many[0]).extra) == 1
    with pytest.raises(UnsupportedModel, match=r"'llama.many1' is an array of 150000 FLOAT32, .* at most 1048576"):
        open_keys(tmp_path, *many)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "more", "error", "message"),
    [
        ({"architecture": None}, (), MalformedFile, "'general.architecture' is missing"),
        ({"architecture": text_key("general.architecture", "")}, (), MalformedFile, "'general.architecture'"),
        ({"architecture": count_key("general.architecture", 1)}, (), MalformedFile, "wanted a string"),
        ({}, (text_key("general.type", "adapter"),), UnsupportedModel, "holds 'adapter', wanted a model"),
        ({"block_count": None}, (), MalformedFile, "'llama.block_count' is missing, wanted a count from 1 to 10000"),
        ({"block_count": count_key("llama.block_count", 0)}, (), MalformedFile, "is 0, wanted a count"),
        ({"block_count": count_key("llama.block_count", 10_001)}, (), MalformedFile, "is 10001, wanted a count"),
        ({"block_count": float_key("llama.block_count", 2.0)}, (), MalformedFile, "the float 2.0, wanted an integer"),
        ({"block_count": key("llama.block_count", BOOL, b"\1")}, (), MalformedFile, "the bool True, wanted an integer"),
        ({"embedding_length": count_key("llama.embedding_length", 2**31)}, (), MalformedFile, "is 2147483648"),
        ({"head_count": count_key("llama.attention.head_count", 7)}, (), MalformedFile, "a divisor of the hidden size"),
        ({"head_count_kv": count_key("llama.attention.head_count_kv", 3)}, (), MalformedFile, "divisor of the 4 heads"),
        ({"head_count_kv": count_key("llama.attention.head_count_kv", 8)}, (), MalformedFile, "divisor of the 4 heads"),
        ({"rms_epsilon": None}, (), MalformedFile, "'llama.attention.layer_norm_rms_epsilon' is missing"),
        *(
            ({"rms_epsilon": float_key("llama.attention.layer_norm_rms_epsilon", value)}, (), MalformedFile, "epsilon")
            for value in (0.0, 1.0, -1.0, NAN, INF)
        ),
        ({}, (count_key("llama.attention.key_length", 32),), UnsupportedModel, "keys of 32 and values of 16"),
        ({}, (count_key("llama.rope.dimension_count", 15),), MalformedFile, "is 15, wanted an even count"),
        ({}, (count_key("llama.rope.dimension_count", 32),), MalformedFile, "up to the head's 16"),
        ({}, (float_key("llama.rope.freq_base", 0.0),), MalformedFile, "'llama.rope.freq_base' is 0.0"),
        ({}, (float_key("llama.rope.freq_base", 1.0),), MalformedFile, "'llama.rope.freq_base' is 1"),
        ({}, (float_key("llama.rope.freq_base", INF),), MalformedFile, "'llama.rope.freq_base' is inf"),
        ({}, (count_key("llama.rope.freq_base", 10_000),), MalformedFile, "the int 10000, wanted a float"),
        ({}, (float_key("llama.rope.scaling.factor", -2.0),), MalformedFile, "'llama.rope.scaling.factor' is -2.0"),
        ({}, (text_key("llama.rope.scaling.type", "longrope"),), MalformedFile, "without 'rope_factors_short.weight'"),
        ({}, (text_key("llama.rope.scaling.type", "ntk"),), UnsupportedModel, "'ntk' is not implemented"),
        ({}, (YARN[0], float_key("llama.rope.scaling.factor", 0.5)), MalformedFile, "wanted at least 1 with YaRN"),
        ({}, (float_key("llama.rope.scaling.attn_factor", NAN),), MalformedFile, "'llama.rope.scaling.attn_factor'"),
        ({}, (text_key("llama.rope.scaling.type", b"\xff"),), MalformedFile, "not UTF-8"),
    ],
)
def test_refusals(
    tmp_path: Path,
    changes: dict[str, bytes | None],
    more: tuple[bytes, ...],
    error: type[ModelError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_keys(tmp_path, *more, **changes)
    assert "model.gguf" in str(caught.value)


def test_safetensors_alone_and_other_folders_are_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b'{"__metadata__":{}}  ')
    for refused in (path, tmp_path):
        with pytest.raises(UnsupportedModel, match=r"config.json[^$]*hint: ") as caught:
            open_checkpoint(refused)
        assert str(refused) in str(caught.value)
