"""OLMoE. Source: the class `llm_build_olmoe` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.parts import MIXTURE_KEYS, attention, decoder, routed_experts
from pipo.models.stage import Stage

HARMLESS_KEYS = {**MIXTURE_KEYS, "expert_weights_norm": False}


def olmoe_stages(manifest: Manifest) -> list[Stage]:
    """Queries and keys normalised over all heads; weights of experts as the softmax over all gave them."""
    h = manifest.hyper
    q_size, kv_size = h.num_q_heads * h.head_dim, h.num_kv_heads * h.head_dim

    def block(book: TensorBook, i: int) -> list[Stage]:
        first = attention(book, h, i, attn_q_norm=q_size, attn_k_norm=kv_size)
        return routed_experts(book, h, first, h.expert_size or h.intermediate_size, renormalise=False)

    return decoder(manifest, HARMLESS_KEYS, block)
