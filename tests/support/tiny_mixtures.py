"""Tiny random mixtures of experts, as transformers has them, and how llama.cpp's converter cuts their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FloatArray = npt.NDArray[np.float32]
EXPERT_SIZE, SHARED_SIZE = 32, 64
WINDOW = 40  # tokens that every other layer of gpt-oss sees


def make_model(family: str, shared: Mapping[str, Any], num_experts: int, num_experts_per_tok: int) -> PreTrainedModel:
    """`shared` are the settings of every family."""
    used: dict[str, Any] = {"num_experts_per_tok": num_experts_per_tok, **shared}
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=num_experts, sliding_window=None, **used))
    used["num_experts"] = num_experts
    if family == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(norm_topk_prob=False, pad_token_id=0, **used))
    if family == "gpt-oss":
        return _gpt_oss(used)
    used |= {"moe_intermediate_size": EXPERT_SIZE, "decoder_sparse_step": 1}
    if family == "qwen2moe":
        config = Qwen2MoeConfig(
            shared_expert_intermediate_size=SHARED_SIZE, norm_topk_prob=False, qkv_bias=True, **used
        )
        return Qwen2MoeForCausalLM(config)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(norm_topk_prob=True, **used))


def _gpt_oss(settings: dict[str, Any]) -> PreTrainedModel:
    settings |= {"sliding_window": WINDOW, "num_local_experts": settings.pop("num_experts"), "attention_bias": True}
    return GptOssForCausalLM(GptOssConfig(**settings | {"intermediate_size": EXPERT_SIZE}))


def add_metadata(writer: GGUFWriter, config: Any) -> None:
    """The keys of a mixture; nothing for a dense model."""
    num_experts = num_experts_of(config)
    if not num_experts:
        return
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def num_experts_of(config: Any) -> int:
    return int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)


def _of_gpt_oss(layer: str, kind: str, weight: FloatArray) -> Iterator[tuple[str, FloatArray]]:
    """Transposed, gate and up by turns; biases too."""
    part = "bias" if kind.endswith("_bias") else "weight"
    weight = weight if part == "bias" else weight.swapaxes(1, 2)
    roles = {"down": weight} if kind.startswith("down") else {"gate": weight[:, ::2], "up": weight[:, 1::2]}
    for role, values in roles.items():
        yield f"blk.{layer}.ffn_{role}_exps.{part}", np.ascontiguousarray(values)


def expert_tensors(name: str, weight: FloatArray, *, is_gpt_oss: bool) -> Iterator[tuple[str, FloatArray]]:
    """`model.layers.3.mlp.experts.gate_up_proj` (experts, gate and up, hidden) → one GGUF tensor each."""
    layer, kind = name.split(".")[2], name.split(".")[-1]
    if is_gpt_oss:
        yield from _of_gpt_oss(layer, kind, weight)
        return
    if kind == "down_proj":
        yield f"blk.{layer}.ffn_down_exps.weight", np.ascontiguousarray(weight)
        return
    for role, half in zip(("gate", "up"), np.split(weight, 2, axis=1), strict=True):
        yield f"blk.{layer}.ffn_{role}_exps.weight", np.ascontiguousarray(half)
