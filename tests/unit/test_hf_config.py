"""config.json: what each family's fields mean, in both spellings, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.manifest import RopeLayout, RopeScaling
from pipo.formats.hf_families import FAMILIES
from pipo.models.registry import FAMILIES as RUN
from tests.support.hf_changes import changed_hyper as hyper
from tests.support.hf_changes import read_changed as read

MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 16, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64}


def test_every_family_runs() -> None:
    assert {family.architecture for family in FAMILIES.values()} == set(RUN) - {"gpt-oss"}  # whose files are MXFP4


def test_llama(tmp_path: Path) -> None:
    model = read(tmp_path)
    h = model.hyper
    assert (h.architecture, h.hidden_size, h.intermediate_size, h.num_layers) == ("llama", 32, 64, 1)
    assert (h.num_q_heads, h.num_kv_heads, h.head_dim, h.vocab_size, h.context_tokens) == (4, 2, 8, 320, 256)
    assert (h.rope.layout, h.rope.num_dims, h.rope.base, h.rope.scaling) == (RopeLayout.NEOX, 8, 1e4, RopeScaling.NONE)
    assert not model.is_tied and not model.vectors


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
@pytest.mark.parametrize("how", [..., None, "x", True, -1, 1e99])
def test_required_fields(missing: str, how: object, tmp_path: Path) -> None:
    with pytest.raises(MalformedFile, match=f"field '{missing}' is .*, wanted a"):
        read(tmp_path, **{missing: how})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_logit_scale", 2.0),
        ("use_qk_norm", True),
        ("residual_multiplier", 0.5),
        ("num_nextn_predict_layers", 1),
        ("no_rope_layers", [1]),
        ("kv_lora_rank", 512),
        ("is_decoder", True),
        ("rope_interleaved", True),
        ("use_mrope", True),
        ("sliding_window", 64),
        ("hidden_act", "gelu"),
    ],
)
def test_fields_that_ask_for_more_are_refused_by_name(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"field '{field}' "):
        read(tmp_path, **{field: value})


def test_fields_of_published_configs_that_change_nothing(tmp_path: Path) -> None:
    read(
        tmp_path,
        attention_dropout=0.0,
        initializer_range=0.02,
        pretraining_tp=1,
        use_cache=True,
        rope_scaling=None,
        rope_interleaved=False,
        is_llama_config=True,
        _name_or_path="x/y",
        unknown_but_null=None,
        **{"transformers.js_config": {"dtype": "q4"}},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, "model type 'deepseek_v3' is not implemented"),
        ({"model_type": None}, "model type '' is not implemented"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3' reads more than text"),
        ({"model_type": "llava", "text_config": {"a": 1}}, "'llava' reads more than text"),
    ],
)
def test_models_that_are_not_run(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("fp8", "FP8"),
        ("bitsandbytes", "bitsandbytes"),
        ("mxfp4", "MXFP4"),
        ("compressed-tensors", "compressed-tensors"),
        ("tomorrow's", "tomorrow's"),
    ],
)
def test_quantised_models(method: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"quantised by {name} .quantization_config") as refused:
        read(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    assert refused.value.hint and "original precision" in refused.value.hint


def test_mlx_models(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"quantised by MLX .quantization."):
        read(tmp_path, quantization={"group_size": 64, "bits": 4})


# Families


def test_mistral_windows(tmp_path: Path) -> None:
    sliding = hyper(tmp_path, model_type="mistral", sliding_window=64)
    assert (sliding.sliding_window, sliding.sliding_layers) == (64, (True,))
    for window in (None, 256, 4096, ...):
        assert hyper(tmp_path, model_type="mistral", sliding_window=window).sliding_window == 0
    assert (
        hyper(tmp_path, model_type="mistral", sliding_window=..., max_position_embeddings=8192).sliding_window == 4096
    )


def test_mixtral(tmp_path: Path) -> None:
    h = hyper(tmp_path, model_type="mixtral", **MIXTURE, output_router_logits=False, router_aux_loss_coef=0.02)
    assert (h.num_experts, h.num_experts_per_tok, h.expert_size) == (8, 2, 0)
    assert hyper(tmp_path, model_type="mixtral", **MIXTURE, rope_theta=...).rope.base == 1e6
    assert hyper(tmp_path, model_type="mixtral", **MIXTURE, sliding_window=64).sliding_window == 64
    with pytest.raises(MalformedFile, match="'num_experts_per_tok' is 9"):
        read(tmp_path, model_type="mixtral", num_local_experts=8, num_experts_per_tok=9)


def test_qwen_moe(tmp_path: Path) -> None:
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    h = hyper(tmp_path, model_type="qwen3_moe", norm_topk_prob=True, head_dim=16, **sizes)
    assert (h.num_experts, h.expert_size, h.head_dim) == (6, 24, 16)
    shared = read(tmp_path, model_type="qwen2_moe", shared_expert_intermediate_size=40, **sizes)
    assert shared.hyper.shared_expert_size == 40 and shared.names.biases == {"attn_q", "attn_k", "attn_v"}
    for field, value in (("norm_topk_prob", False), ("decoder_sparse_step", 2), ("mlp_only_layers", [0])):
        with pytest.raises(UnsupportedModel, match=field):
            read(tmp_path, **{"model_type": "qwen3_moe", "norm_topk_prob": True, **sizes, field: value})


def test_olmoe(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="clip_qkv"):
        read(tmp_path, model_type="olmoe", num_experts=8, num_experts_per_tok=2, clip_qkv=8.0)


def test_qwen_windows(tmp_path: Path) -> None:
    off = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}
    assert hyper(tmp_path, model_type="qwen2", **off).sliding_window == 0
    no_window = {**off, "use_sliding_window": True, "sliding_window": None}
    assert hyper(tmp_path, model_type="qwen2", **no_window).sliding_window == 0
    on = hyper(
        tmp_path, model_type="qwen2", num_hidden_layers=3, **{**off, "use_sliding_window": True, "max_window_layers": 1}
    )
    assert (on.sliding_window, on.sliding_layers) == (64, (False, True, True))
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    named = hyper(
        tmp_path,
        model_type="qwen3",
        head_dim=8,
        num_hidden_layers=3,
        **{**off, "use_sliding_window": True},
        layer_types=kinds,
    )
    assert named.sliding_layers == (True, False, False)


def test_smollm3(tmp_path: Path) -> None:
    assert hyper(tmp_path, model_type="smollm3", num_hidden_layers=5).unrotated_layers == (False,) * 3 + (True, False)
    assert hyper(tmp_path, model_type="smollm3", num_hidden_layers=2, no_rope_layers=[0, 1]).unrotated_layers == (
        True,
        False,
    )
    with pytest.raises(MalformedFile, match="no_rope_layers"):
        read(tmp_path, model_type="smollm3", no_rope_layers=[0, 1])


def test_gemma2(tmp_path: Path) -> None:
    h = hyper(tmp_path, model_type="gemma2", num_hidden_layers=3, sliding_window=64, **GEMMA)
    assert (h.sliding_window, h.sliding_layers) == (64, (True, False, True))
    assert (h.attention_softcap, h.final_softcap, h.attention_scale) == (50.0, 30.0, 0.125)
    assert h.embedding_scale == sqrt(32)
    off = hyper(tmp_path, model_type="gemma2", **GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (off.attention_softcap, off.final_softcap) == (0.0, 0.0)


def test_gemma3(tmp_path: Path) -> None:
    old = hyper(
        tmp_path,
        model_type="gemma3_text",
        num_hidden_layers=7,
        sliding_window=64,
        sliding_window_pattern=6,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **GEMMA,
    )
    new = hyper(
        tmp_path,
        model_type="gemma3_text",
        num_hidden_layers=7,
        sliding_window=64,
        rope_theta=...,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        **GEMMA,
    )
    assert old == new
    assert new.sliding_layers == (True,) * 5 + (False, True)
    assert new.local_rope == replace(new.rope, base=1e4, scaling=RopeScaling.NONE, factor=1.0)
    assert (new.rope.base, new.rope.factor, new.attention_softcap) == (1e6, 8.0, 0.0)
    assert read(tmp_path, model_type="gemma3_text", tie_word_embeddings=..., **GEMMA).is_tied
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention"):
        read(tmp_path, model_type="gemma3_text", use_bidirectional_attention=True, **GEMMA)


def test_opt(tmp_path: Path) -> None:
    opt = {
        "model_type": "opt",
        "ffn_dim": 96,
        "intermediate_size": ...,
        "rms_norm_eps": ...,
        "num_key_value_heads": ...,
        "hidden_act": ...,
        "rope_theta": ...,
        "tie_word_embeddings": ...,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 32,
    }
    model = read(tmp_path, **opt)
    assert (model.hyper.intermediate_size, model.hyper.num_kv_heads, model.is_tied) == (96, 4, True)
    for field, value in (("do_layer_norm_before", False), ("word_embed_proj_dim", 16), ("activation_function", "gelu")):
        with pytest.raises(UnsupportedModel, match=field):
            read(tmp_path, **{**opt, field: value})


# Fields as they stand in published files, sizes aside.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.2": {
        "head_dim": 8, "mlp_bias": False, "attention_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009], "initializer_range": 0.02, "use_cache": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192},
    },
    "Mistral 0.1": {"model_type": "mistral", "sliding_window": 4096, "attention_dropout": 0.0},
    "Mixtral": {
        "model_type": "mixtral", **MIXTURE, "output_router_logits": False, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "rope_theta": 1000000.0,
    },
    "Qwen 2.5": {
        "model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768, "use_mrope": False,
        "use_sliding_window": False, "rope_theta": 1000000.0,
    },
    "Qwen 1.5 MoE": {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "max_window_layers": 21, "moe_intermediate_size": 24,
        "norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 4, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 48, "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "Qwen 3 MoE": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 16,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 24, "norm_topk_prob": True,
        "num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False, "rope_scaling": None,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
    },
    "OLMoE": {
        "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "norm_topk_prob": False, "num_experts": 8,
        "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.01, "rope_scaling": None,
    },
    "SmolLM 3": {
        "model_type": "smollm3", "attention_bias": False, "layer_types": ["full_attention"], "max_window_layers": 28,
        "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1], "pretraining_tp": 2,
        "sliding_window": None, "use_sliding_window": False, "rope_scaling": None, "rope_theta": 5000000.0,
    },
    "Gemma 2": {
        "model_type": "gemma2", **GEMMA, "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        "sliding_window": 4096, "sliding_window_size": 4096, "tie_word_embeddings": ...,
    },
    "Gemma 3": {
        "model_type": "gemma3_text", **GEMMA, "attention_bias": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "tie_word_embeddings": ...,
    },
    "Phi-4-mini": {
        "model_type": "phi3", "attention_bias": False, "auto_map": {"AutoConfig": "x.Y"}, "embd_pdrop": 0.0,
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "resid_pdrop": 0.0,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1.0] * 3, "short_factor": [1.0] * 3, "type": "longrope"},
    },
    "Phi-3-mini-4k": {
        "model_type": "phi3", "original_max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047,
        "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name: str, tmp_path: Path) -> None:
    read(tmp_path, **PUBLISHED[name])


def test_a_rope_for_layers_that_slide_is_not_for_every_family(tmp_path: Path) -> None:
    tables = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert hyper(tmp_path, rope_theta=..., rope_parameters={"full_attention": {"rope_theta": 1e6}}).rope.base == 1e6
    with pytest.raises(UnsupportedModel, match=r"'rope_parameters\.sliding_attention' = "):
        read(tmp_path, rope_theta=..., rope_parameters=tables)
