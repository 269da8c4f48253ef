"""The Llama family as GGUF writes it under the architecture `llama`: Llama, Mistral, Mixtral, SmolLM and their likes.

Mixtral is a Llama whose MLPs are experts. Source: the class `llm_build_llama` of llama.cpp.
"""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.parts import attention, decoder, gated_mlp, routed_experts
from pipo.models.stage import Stage

# keys that change nothing here as long as they say this
HARMLESS_KEYS: dict[str, object] = {
    "attention.causal": True,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


def llama_stages(manifest: Manifest) -> list[Stage]:
    """Attention and MLP, or experts, of every block. Raises UnsupportedModel, MalformedFile."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        first = attention(book, h, i)
        if not h.num_experts:
            return [first, gated_mlp(book, h, i)]
        return routed_experts(book, h, first, h.expert_size or h.intermediate_size, renormalise=True)

    return decoder(manifest, HARMLESS_KEYS, block)
