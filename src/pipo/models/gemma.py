"""Gemma 2 and 3. Source: the classes `llm_build_gemma2` and `llm_build_gemma3` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.blocks import lay_gelu_mlp
from pipo.models.checks import TensorBook
from pipo.models.parts import HARMLESS_KEYS, attention, decoder, gated_mlp
from pipo.models.stage import Stage


def gemma2_stages(manifest: Manifest) -> list[Stage]:
    """What attention and MLP give is normalised before it is added. Every other layer slides; scores and logits are
    capped.
    """
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        return [
            attention(book, h, i, post_attention_norm=h.hidden_size),
            gated_mlp(book, h, i, lay_gelu_mlp, post_ffw_norm=h.hidden_size),
        ]

    return decoder(manifest, HARMLESS_KEYS, block)


def gemma3_stages(manifest: Manifest) -> list[Stage]:
    """As Gemma 2, with queries and keys normalised head by head, and a rotary base of their own in layers that slide:
    five of six.
    """
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        norms = {"attn_q_norm": h.head_dim, "attn_k_norm": h.head_dim, "post_attention_norm": h.hidden_size}
        return [
            attention(book, h, i, **norms),
            gated_mlp(book, h, i, lay_gelu_mlp, post_ffw_norm=h.hidden_size),
        ]

    return decoder(manifest, HARMLESS_KEYS, block)
