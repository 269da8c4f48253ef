"""The Llama family as GGUF writes it under the architecture `llama`: Llama, Mistral, SmolLM and their likes."""

from __future__ import annotations

from pipo.base.manifest import Manifest, RopeScaling
from pipo.models.blocks import lay_attention, lay_final_norm, lay_gated_mlp, lay_head
from pipo.models.checks import TensorBook, refuse_unknown_keys
from pipo.models.stage import Stage, StageKind

# keys that change nothing here as long as they say this
HARMLESS_KEYS: dict[str, object] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "use_parallel_residual": False,
    "tensor_data_layout": "Meta AI original pth",
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


def llama_stages(manifest: Manifest) -> list[Stage]:
    """Attention and MLP of every block, then the final norm and the head. Raises UnsupportedModel, MalformedFile."""
    refuse_unknown_keys(manifest, HARMLESS_KEYS)
    book = TensorBook(manifest)
    stages = [stage for i in range(manifest.hyper.num_layers) for stage in _block(book, manifest, i)]
    h = manifest.hyper
    embedding = book.matrix("token_embd.weight", h.hidden_size, h.vocab_size)
    head = book.optional_matrix("output.weight", h.hidden_size, h.vocab_size) or embedding
    norm = book.vector("output_norm.weight", h.hidden_size)
    stages.append(Stage(StageKind.FINAL_NORM, -1, {}, {"output_norm.weight": norm}, lay_final_norm))
    stages.append(Stage(StageKind.HEAD, -1, {"output.weight": head}, {}, lay_head))
    book.refuse_leftovers()
    return stages


def _block(book: TensorBook, manifest: Manifest, i: int) -> list[Stage]:
    h = manifest.hyper
    q_size, kv_size = h.num_q_heads * h.head_dim, h.num_kv_heads * h.head_dim
    attention = book.linears(i, attn_q=(h.hidden_size, q_size), attn_k=(h.hidden_size, kv_size),
                             attn_v=(h.hidden_size, kv_size), attn_output=(q_size, h.hidden_size))  # fmt: skip
    mlp = book.linears(i, ffn_gate=(h.hidden_size, h.intermediate_size), ffn_up=(h.hidden_size, h.intermediate_size),
                       ffn_down=(h.intermediate_size, h.hidden_size))  # fmt: skip
    attention_vectors = {"attn_norm.weight": book.vector(f"blk.{i}.attn_norm.weight", h.hidden_size)}
    if h.rope.scaling is RopeScaling.FREQ_FACTORS:
        attention_vectors["rope_freqs.weight"] = book.vector("rope_freqs.weight", h.rope.num_dims // 2)
    mlp_vectors = {"ffn_norm.weight": book.vector(f"blk.{i}.ffn_norm.weight", h.hidden_size)}
    return [
        Stage(StageKind.ATTENTION, i, attention.matrices, attention_vectors | attention.biases, lay_attention),
        Stage(StageKind.MLP, i, mlp.matrices, mlp_vectors | mlp.biases, lay_gated_mlp),
    ]
