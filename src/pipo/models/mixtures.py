"""Families that are mixtures of experts throughout: OLMoE, Qwen 2 and Qwen 3 MoE.

Source: the classes `llm_build_olmoe`, `llm_build_qwen2moe` and `llm_build_qwen3moe` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook, refuse_unknown_keys
from pipo.models.parts import attention, output_stages, routed_experts, shared_expert
from pipo.models.stage import Stage

# keys that change nothing here as long as they say this
_HARMLESS_KEYS: dict[str, object] = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_gating_func": 1,  # softmax
}
_OLMOE_KEYS: dict[str, object] = {**_HARMLESS_KEYS, "expert_weights_norm": False}
_QWEN2_KEYS: dict[str, object] = {**_HARMLESS_KEYS, "expert_weights_norm": False}
_QWEN3_KEYS: dict[str, object] = {**_HARMLESS_KEYS, "expert_weights_norm": True}


def olmoe_stages(manifest: Manifest) -> list[Stage]:
    """Queries and keys normalised over all heads; weights of experts as the softmax over all gave them."""
    h = manifest.hyper
    q_size, kv_size = h.num_q_heads * h.head_dim, h.num_kv_heads * h.head_dim

    def block(book: TensorBook, i: int) -> list[Stage]:
        size = h.expert_size or h.intermediate_size
        first = attention(book, h, i, attn_q_norm=q_size, attn_k_norm=kv_size)
        return routed_experts(book, h, first, size, renormalise=False)

    return _stages(manifest, _OLMOE_KEYS, block)


def qwen2moe_stages(manifest: Manifest) -> list[Stage]:
    """Biases of queries, keys and values; an expert that every token passes, behind a gate of its own."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        size = h.expert_size or h.intermediate_size // h.num_experts_per_tok
        return [
            *routed_experts(book, h, attention(book, h, i), size, renormalise=False),
            shared_expert(book, h, i, h.shared_expert_size or h.intermediate_size),
        ]

    return _stages(manifest, _QWEN2_KEYS, block)


def qwen3moe_stages(manifest: Manifest) -> list[Stage]:
    """Queries and keys normalised head by head; the weights of a token's experts add up to 1."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        size = h.expert_size or h.intermediate_size // h.num_experts_per_tok
        first = attention(book, h, i, attn_q_norm=h.head_dim, attn_k_norm=h.head_dim)
        return routed_experts(book, h, first, size, renormalise=True)

    return _stages(manifest, _QWEN3_KEYS, block)


def _stages(
    manifest: Manifest, harmless: dict[str, object], block: Callable[[TensorBook, int], list[Stage]]
) -> list[Stage]:
    """Raises UnsupportedModel, MalformedFile."""
    refuse_unknown_keys(manifest, harmless)
    book = TensorBook(manifest)
    if not manifest.hyper.num_experts:
        book.refuse_dense()
    stages = [stage for i in range(manifest.hyper.num_layers) for stage in block(book, i)]
    stages += output_stages(book, manifest)
    book.refuse_leftovers()
    return stages
