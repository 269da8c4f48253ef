"""Tiny random checkpoints of families besides Llama and its mixtures, as transformers has them, and what
llama.cpp's converter writes of each besides what a Llama has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

FloatArray = npt.NDArray[np.float32]
WINDOW = 40  # tokens: prompts of the tests are longer
CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0}  # low enough to show
SHORT, LONG = (1.0, 1.3, 1.7, 2.0), (1.5, 3.0, 6.0, 9.0)  # divisors, of heads of 16 with half of them rotated
LOCAL_THETA = 1000.0
UNROTATED = (3,)  # layers, of five


def make_model(family: str, shared: Mapping[str, Any]) -> PreTrainedModel:
    """`shared` are the settings of every family."""
    return _MAKERS[family](dict(shared))


def _gemma2(settings: dict[str, Any]) -> PreTrainedModel:
    settings |= {"query_pre_attn_scalar": settings["head_dim"], "sliding_window": WINDOW, **CAPS}
    return Gemma2ForCausalLM(Gemma2Config(**settings))


def _gemma3(settings: dict[str, Any]) -> PreTrainedModel:
    """Of seven layers the sixth sees everything."""
    theta = settings.pop("rope_parameters")["rope_theta"]
    settings["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
    }
    settings |= {"query_pre_attn_scalar": settings["head_dim"], "sliding_window": WINDOW}
    return Gemma3ForCausalLM(Gemma3TextConfig(**settings))


def _phi3(settings: dict[str, Any]) -> PreTrainedModel:
    """Contexts beyond the original one have other rotary factors."""
    theta = settings.pop("rope_parameters")["rope_theta"]
    original = settings["max_position_embeddings"] // 4
    settings["rope_parameters"] = {
        "rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG), "rope_theta": theta,
        "original_max_position_embeddings": original, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    settings.pop("head_dim")
    return Phi3ForCausalLM(
        Phi3Config(original_max_position_embeddings=original, pad_token_id=0, sliding_window=None, **settings)
    )


def _phi3_sliding(settings: dict[str, Any]) -> PreTrainedModel:
    settings.pop("head_dim")
    return Phi3ForCausalLM(Phi3Config(pad_token_id=0, sliding_window=WINDOW, **settings))


def _smollm3(settings: dict[str, Any]) -> PreTrainedModel:
    rotated = [int(i not in UNROTATED) for i in range(settings["num_hidden_layers"])]
    return SmolLM3ForCausalLM(SmolLM3Config(pad_token_id=0, no_rope_layers=rotated, **settings))


def _opt(settings: dict[str, Any]) -> PreTrainedModel:
    taken = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
    config = OPTConfig(
        ffn_dim=settings["intermediate_size"], attn_implementation="eager", tie_word_embeddings=True,
        **{name: settings[name] for name in taken},
    )  # fmt: skip
    return OPTForCausalLM(config)


_MAKERS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "opt": _opt,
    "phi3": _phi3,
    "phi3-sliding": _phi3_sliding,
    "qwen2": lambda settings: Qwen2ForCausalLM(Qwen2Config(**settings)),
    "qwen3": lambda settings: Qwen3ForCausalLM(Qwen3Config(**settings)),
    "smollm3": _smollm3,
}
NAMES = tuple(_MAKERS)
ARCHITECTURES = {"gemma3_text": "gemma3"}  # llama.cpp's names where they are others


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Of a block's parts, and of the rest."""

    block: Mapping[str, str]
    top: Mapping[str, str]


_GEMMA_BLOCK = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OPT_BLOCK = {
    "self_attn.out_proj": "attn_output",
    "self_attn_layer_norm": "attn_norm",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
_NAMES = {
    "gemma2": TensorNames(_GEMMA_BLOCK, {}),
    "gemma3_text": TensorNames(_GEMMA_BLOCK, {}),
    "phi3": TensorNames({"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}, {}),
    "gpt_oss": TensorNames({"post_attention_layernorm": "post_attention_norm", "self_attn.sinks": "attn_sinks"}, {}),
    "opt": TensorNames(_OPT_BLOCK, {"final_layer_norm": "output_norm", "embed_positions": "position_embd"}),
}


def names_of(config: Any) -> TensorNames:
    return _NAMES.get(config.model_type, TensorNames({}, {}))


SLIDING = ("mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss")


def add_metadata(writer: GGUFWriter, config: Any) -> None:
    """The keys that a Llama does not have."""
    if config.model_type in SLIDING and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        writer.add_float32("gemma3.rope.freq_base_swa", LOCAL_THETA)
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        growth = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(growth) / math.log(original)))


def rope_of(config: Any) -> Mapping[str, Any]:
    """Of the layers that see everything."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {"rope_type": "none"}
    return rope.get("full_attention", rope)


def num_rotated(config: Any, head_dim: int) -> int:
    return int(head_dim * rope_of(config).get("partial_rotary_factor", 1.0))


class _GeluOfGgml(torch.nn.Module):
    """As llama.cpp computes it on the CPU: from a table of half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, rounded, x.clamp(min=0))


def with_gelu_of_ggml(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, changed where its family has a GELU."""
    if model.config.model_type.startswith("gemma"):
        for module in list(model.modules()):
            if hasattr(module, "act_fn"):
                module.act_fn = _GeluOfGgml()
    return model


def extra_tensors(config: Any) -> Iterator[tuple[str, FloatArray]]:
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", np.asarray(rope[f"{kind}_factor"], np.float32)


def changed(config: Any, name: str, weight: FloatArray) -> FloatArray:
    """As the converter stores it: Gemma's norms multiply by 1 + w, OPT's first two positions are never used."""
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return weight + np.float32(1)
    return weight[2:] if name == "model.decoder.embed_positions.weight" else weight
