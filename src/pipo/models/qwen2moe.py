"""Qwen 1.5 and 2 MoE. Source: the class `llm_build_qwen2moe` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.parts import MIXTURE_KEYS, attention, decoder, routed_experts, share_of_mlp, shared_expert
from pipo.models.stage import Stage

HARMLESS_KEYS = {**MIXTURE_KEYS, "expert_weights_norm": False}


def qwen2moe_stages(manifest: Manifest) -> list[Stage]:
    """Biases of queries, keys and values; an expert that every token passes, behind a gate of its own."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        return [
            *routed_experts(book, h, attention(book, h, i), share_of_mlp(h), renormalise=False),
            shared_expert(book, h, i, h.shared_expert_size or h.intermediate_size),
        ]

    return decoder(manifest, HARMLESS_KEYS, block)
