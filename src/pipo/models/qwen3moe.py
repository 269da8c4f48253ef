"""Qwen 3 MoE. Source: the class `llm_build_qwen3moe` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.parts import SOFTMAX_GATING, attention, decoder, routed_experts
from pipo.models.stage import Stage

HARMLESS_KEYS: dict[str, object] = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_gating_func": SOFTMAX_GATING,
    "expert_weights_norm": True,
}


def qwen3moe_stages(manifest: Manifest) -> list[Stage]:
    """Queries and keys normalised head by head; the weights of a token's experts add up to 1."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        first = attention(book, h, i, attn_q_norm=h.head_dim, attn_k_norm=h.head_dim)
        size = h.expert_size or h.intermediate_size // max(h.num_experts_per_tok, 1)
        return routed_experts(book, h, first, size, renormalise=True)

    return decoder(manifest, HARMLESS_KEYS, block)
