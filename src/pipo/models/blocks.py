"""The stages decoder families share, laid in ggml ops. Shapes are ggml's: fastest dimension first, T tokens.

Leaves the pipeline binds besides weights: `hidden` (hidden_size, T) F32, read and written in place · `positions` (T,)
I32 · `kv_rows` (T,) I64 · `mask` and, of layers that slide, `local_mask` (any,) F16 · `k_cache.i`, `v_cache.i` of
group i (kv heads * head_dim, kv rows) · `out_rows` (outputs,) I32 · `normed` (hidden_size, outputs) F32 · `logits`
(rows of the piece, outputs) F32; `mixed`, `mixed_rows` and `spread` see `attention.py`.
The tokens of a sequence lie side by side, those of a group too.
"""

from __future__ import annotations

from pipo.base.manifest import Rope, RopeScaling
from pipo.base.tensor_type import TensorType
from pipo.compute.views import Tensor
from pipo.models.attention import mix
from pipo.models.stage import StageBuilder


def lay_attention(s: StageBuilder) -> None:
    s.ops.expand(attend(s))


def lay_sliding_attention(s: StageBuilder) -> None:
    s.ops.expand(attend_sliding(s))


def lay_unrotated_attention(s: StageBuilder) -> None:
    """Of a layer without rotary embedding. Source: SmolLM 3."""
    s.ops.expand(_add_attention(s, None, "mask"))


def attend(s: StageBuilder) -> Tensor:
    """hidden += attention(norm(hidden)), after storing this pass's keys and values in the cache. Source: Llama."""
    return _add_attention(s, s.hyper.rope, "mask")


def attend_sliding(s: StageBuilder) -> Tensor:
    """Of a layer that sees the newest tokens only."""
    return _add_attention(s, s.hyper.local_rope or s.hyper.rope, "local_mask")


def _add_attention(s: StageBuilder, rope: Rope | None, mask: str) -> Tensor:
    hidden = _hidden(s)
    q, k, v = _project(s, s.rms_norm("attn_norm", hidden))
    if rope is not None:
        q, k = _rotate(s, rope, q, k)
    y = s.linear("attn_output", mix(s, q, k, v, mask))
    y = s.rms_norm("post_attention_norm", y) if s.has("post_attention_norm.weight") else y
    return s.ops.add_inplace(hidden, y)


def _project(s: StageBuilder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (head_dim, heads, T), values (head_dim * heads, T)."""
    h = s.hyper
    if not s.has("attn_qkv.weight"):
        return _heads(s, "attn_q", x, h.num_q_heads), _heads(s, "attn_k", x, h.num_kv_heads), s.linear("attn_v", x)
    qkv, num_kv = s.linear("attn_qkv", x), h.head_dim * h.num_kv_heads
    first_k = h.head_dim * h.num_q_heads
    return (
        s.ops.slice_heads(qkv, 0, h.head_dim, h.num_q_heads),
        s.ops.slice_heads(qkv, first_k, h.head_dim, h.num_kv_heads),
        s.ops.slice_rows(qkv, first_k + num_kv, num_kv),
    )


def _rotate(s: StageBuilder, rope: Rope, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    positions, factors = s.ops.leaf("positions", TensorType.I32, s.shape.num_tokens), _rope_factors(s, rope)
    return s.ops.rope(q, positions, rope, factors), s.ops.rope(k, positions, rope, factors)


def _rope_factors(s: StageBuilder, rope: Rope) -> Tensor | None:
    if rope.scaling is RopeScaling.FREQ_FACTORS:
        return s.weight("rope_freqs.weight")
    if rope.scaling is RopeScaling.LONGROPE:
        return s.weight("rope_factors_long.weight" if rope.is_for_long else "rope_factors_short.weight")
    return None


def _heads(s: StageBuilder, role: str, x: Tensor, num_heads: int) -> Tensor:
    """(head_dim, heads, T), normalised where the family does that: over each head (Qwen 3) or all of them (OLMoE)."""
    y, norm = s.linear(role, x), f"{role}_norm"
    if not s.has(f"{norm}.weight"):
        return s.ops.reshape(y, s.hyper.head_dim, num_heads, s.shape.num_tokens)
    is_over_all = s.size_of(f"{norm}.weight") > s.hyper.head_dim
    y = s.rms_norm(norm, y) if is_over_all else y
    heads = s.ops.reshape(y, s.hyper.head_dim, num_heads, s.shape.num_tokens)
    return heads if is_over_all else s.rms_norm(norm, heads)


def lay_gated_mlp(s: StageBuilder) -> None:
    """hidden += down(silu(gate(x)) * up(x)), x = norm(hidden)."""
    hidden = _hidden(s)
    x = s.rms_norm("ffn_norm", hidden)
    _add_down(s, hidden, s.ops.swiglu(s.linear("ffn_gate", x), s.linear("ffn_up", x)))


def lay_fused_mlp(s: StageBuilder) -> None:
    """The same, with gate and up in one matrix, one after the other. Source: Phi-3."""
    hidden = _hidden(s)
    _add_down(s, hidden, s.ops.swiglu_halves(s.linear("ffn_up", s.rms_norm("ffn_norm", hidden))))


def lay_gelu_mlp(s: StageBuilder) -> None:
    """hidden += norm(down(gelu(gate(x)) * up(x))). Source: Gemma."""
    hidden = _hidden(s)
    x = s.rms_norm("ffn_norm", hidden)
    _add_down(s, hidden, s.ops.mul(s.ops.gelu(s.linear("ffn_gate", x)), s.linear("ffn_up", x)))


def _add_down(s: StageBuilder, hidden: Tensor, y: Tensor) -> None:
    y = s.linear("ffn_down", y)
    y = s.rms_norm("post_ffw_norm", y) if s.has("post_ffw_norm.weight") else y
    s.ops.expand(s.ops.add_inplace(hidden, y))


def lay_final_norm(s: StageBuilder) -> None:
    """normed = norm(hidden[out_rows])"""
    rows = s.ops.leaf("out_rows", TensorType.I32, s.shape.num_outputs)
    chosen = s.ops.get_rows(_hidden(s), rows)
    s.ops.expand(s.ops.output("normed", s.rms_norm("output_norm", chosen)))


def lay_head(s: StageBuilder) -> None:
    """logits of the rows this piece of the head holds."""
    normed, cap = s.ops.leaf("normed", TensorType.F32, s.hyper.hidden_size, s.shape.num_outputs), s.hyper.final_softcap
    logits = s.ops.mul_mat(s.weight("output.weight"), normed)
    if cap:
        logits = s.ops.scale(s.ops.tanh(s.ops.scale(logits, 1 / cap)), cap)
    s.ops.expand(s.ops.output("logits", logits))


def _hidden(s: StageBuilder) -> Tensor:
    return s.ops.leaf("hidden", TensorType.F32, s.hyper.hidden_size, s.shape.num_tokens)
