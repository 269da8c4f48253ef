"""gpt-oss: every other layer slides, heads have sinks, experts have biases. Source: `llm_build_openai_moe_iswa` of
llama.cpp.
"""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.experts import lay_clamped_experts
from pipo.models.parts import attention, decoder, routed_experts
from pipo.models.stage import Stage

HARMLESS_KEYS = {"attention.causal": True, "expert_gating_func": 3}  # softmax of those that were chosen


def gpt_oss_stages(manifest: Manifest) -> list[Stage]:
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        first = attention(book, h, i, attn_sinks=h.num_q_heads)
        return routed_experts(
            book,
            h,
            first,
            h.expert_size or h.intermediate_size,
            renormalise=True,
            lay=lay_clamped_experts,
            norm="post_attention_norm",
        )

    return decoder(manifest, HARMLESS_KEYS, block)
