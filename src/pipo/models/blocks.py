"""The stages decoder families share, laid in ggml ops. Shapes are ggml's: fastest dimension first, T tokens.

Leaves the pipeline binds besides weights: `hidden` (hidden_size, T) F32, read and written in place · `positions` (T,)
I32 · `kv_rows` (T,) I64 · `mask` (kv rows, T) F16 · `k_cache`, `v_cache` (kv heads * head_dim, kv rows) ·
`out_rows` (outputs,) I32 · `normed` (hidden_size, outputs) F32 · `logits` (rows of the piece, outputs) F32.
The tokens of a sequence lie side by side; the rows of all sequences are those of one cache.
"""

from __future__ import annotations

from math import sqrt

from pipo.base.manifest import RopeScaling
from pipo.base.tensor_type import TensorType
from pipo.compute.graphs import Tensor
from pipo.models.stage import StageBuilder


def lay_attention(s: StageBuilder) -> None:
    s.ops.expand(attend(s))


def attend(s: StageBuilder) -> Tensor:
    """hidden += attention(norm(hidden)), after storing this pass's keys and values in the cache. Source: Llama."""
    ops, h, num_tokens = s.ops, s.hyper, s.shape.num_tokens
    hidden = _hidden(s)
    x = s.rms_norm("attn_norm", hidden)
    positions = ops.leaf("positions", TensorType.I32, num_tokens)
    factors = s.weight("rope_freqs.weight") if h.rope.scaling is RopeScaling.FREQ_FACTORS else None
    q = ops.rope(_heads(s, "attn_q", x, h.num_q_heads), positions, h.rope, factors)
    k = ops.rope(_heads(s, "attn_k", x, h.num_kv_heads), positions, h.rope, factors)
    keys, values = _store(s, ops.reshape(k, h.head_dim * h.num_kv_heads, num_tokens), s.linear("attn_v", x))
    sequences: tuple[int, ...] = ()
    if s.shape.num_sequences > 1:
        sequences = (1, s.shape.num_sequences)
        q = ops.reshape(q, h.head_dim, h.num_q_heads, s.shape.tokens_each, s.shape.num_sequences)
    mask = ops.leaf("mask", TensorType.F16, s.shape.num_kv_rows, s.shape.tokens_each, *sequences)
    mixed = ops.flash_attention(ops.permute(q, 0, 2, 1), keys, values, mask, 1.0 / sqrt(h.head_dim))
    flat = ops.reshape(mixed, h.head_dim * h.num_q_heads, num_tokens)
    return ops.add_inplace(hidden, s.linear("attn_output", flat))


def _heads(s: StageBuilder, role: str, x: Tensor, num_heads: int) -> Tensor:
    """(head_dim, heads, T), normalised where the family does that: over each head (Qwen 3) or all of them (OLMoE)."""
    y, norm = s.linear(role, x), f"{role}_norm"
    if not s.has(f"{norm}.weight"):
        return s.ops.reshape(y, s.hyper.head_dim, num_heads, s.shape.num_tokens)
    is_over_all = s.size_of(f"{norm}.weight") > s.hyper.head_dim
    y = s.rms_norm(norm, y) if is_over_all else y
    heads = s.ops.reshape(y, s.hyper.head_dim, num_heads, s.shape.num_tokens)
    return heads if is_over_all else s.rms_norm(norm, heads)


def _store(s: StageBuilder, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write new rows into the cache; the views returned depend on the writes, so no device may reorder them."""
    ops, h = s.ops, s.hyper
    rows = ops.leaf("kv_rows", TensorType.I64, s.shape.num_tokens)
    kv_size, num_rows = h.head_dim * h.num_kv_heads, s.shape.num_kv_rows
    sequences = s.shape.num_sequences, s.shape.kv_stride_rows
    num_all = (s.shape.num_sequences - 1) * s.shape.kv_stride_rows + num_rows
    k_cache = ops.leaf("k_cache", s.shape.kv_type_k, kv_size, num_all)
    v_cache = ops.leaf("v_cache", s.shape.kv_type_v, kv_size, num_all)
    return (
        ops.heads_view(ops.set_rows(k_cache, k, rows), h.head_dim, h.num_kv_heads, num_rows, *sequences),
        ops.heads_view(ops.set_rows(v_cache, v, rows), h.head_dim, h.num_kv_heads, num_rows, *sequences),
    )


def lay_gated_mlp(s: StageBuilder) -> None:
    """hidden += down(silu(gate(x)) * up(x)), x = norm(hidden)."""
    hidden = _hidden(s)
    x = s.rms_norm("ffn_norm", hidden)
    y = s.ops.swiglu(s.linear("ffn_gate", x), s.linear("ffn_up", x))
    s.ops.expand(s.ops.add_inplace(hidden, s.linear("ffn_down", y)))


def lay_final_norm(s: StageBuilder) -> None:
    """normed = norm(hidden[out_rows])"""
    rows = s.ops.leaf("out_rows", TensorType.I32, s.shape.num_outputs)
    chosen = s.ops.get_rows(_hidden(s), rows)
    s.ops.expand(s.ops.output("normed", s.rms_norm("output_norm", chosen)))


def lay_head(s: StageBuilder) -> None:
    """logits of the rows this piece of the head holds."""
    normed = s.ops.leaf("normed", TensorType.F32, s.hyper.hidden_size, s.shape.num_outputs)
    s.ops.expand(s.ops.output("logits", s.ops.mul_mat(s.weight("output.weight"), normed)))


def _hidden(s: StageBuilder) -> Tensor:
    return s.ops.leaf("hidden", TensorType.F32, s.hyper.hidden_size, s.shape.num_tokens)
