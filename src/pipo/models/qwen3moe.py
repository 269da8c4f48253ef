"""Qwen 3 MoE. Source: the class `llm_build_qwen3moe` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.parts import MIXTURE_KEYS, attention, decoder, routed_experts, share_of_mlp
from pipo.models.stage import Stage

HARMLESS_KEYS = {**MIXTURE_KEYS, "expert_weights_norm": True}


def qwen3moe_stages(manifest: Manifest) -> list[Stage]:
    """Queries and keys normalised head by head; the weights of a token's experts add up to 1."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        first = attention(book, h, i, attn_q_norm=h.head_dim, attn_k_norm=h.head_dim)
        return routed_experts(book, h, first, share_of_mlp(h), renormalise=True)

    return decoder(manifest, HARMLESS_KEYS, block)
