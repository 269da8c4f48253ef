"""The stages of a mixture of experts, laid in ggml ops. Shapes are ggml's: fastest dimension first, T tokens.

Leaves besides those of `pipo.models.blocks`: `ffn_x` (hidden_size, T), what the block's experts read · `router` and
`next_router` (experts, T), scores before the softmax, of this block and, guessed from its hidden state, of the next.
Of the expert in place i of a graph, over the R rows it computes: `rows.i` (R,) I32, the tokens · `out.i` (R,) I64, the
rows its results go to · `weights.i` (1, R), how much of each is added.
`expert_out` (hidden_size, R): results that are not added yet, token by token, in the order of their experts' numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from pipo.base.tensor_type import TensorType
from pipo.compute.views import Tensor
from pipo.models.blocks import attend, attend_sliding
from pipo.models.stage import ExpertShape, StageBuilder, Sum

CLAMP_ALPHA, CLAMP_LIMIT = 1.702, 7.0  # gpt-oss


def lay_attention_and_router(s: StageBuilder) -> None:
    """Attention, then ffn_x = norm(hidden); router = gate @ ffn_x; next_router = the next block's gate @ its
    norm(hidden). In one graph: starting another takes longer than to compute the scores.
    """
    _lay_router(s, attend(s))


def lay_sliding_attention_and_router(s: StageBuilder) -> None:
    _lay_router(s, attend_sliding(s))


def _lay_router(s: StageBuilder, hidden: Tensor) -> None:
    s.ops.expand(hidden)
    x = s.ops.output("ffn_x", s.rms_norm("ffn_norm", hidden))
    s.ops.expand(s.ops.output("router", s.linear("ffn_gate_inp", x)))
    if s.has("next_ffn_gate_inp.weight"):
        guessed = s.linear("next_ffn_gate_inp", s.rms_norm("next_ffn_norm", hidden))
        s.ops.expand(s.ops.output("next_router", guessed))


def lay_shared_expert(s: StageBuilder) -> None:
    """hidden += sigmoid(gate · ffn_x) * down(silu(gate(ffn_x)) * up(ffn_x)). Source: Qwen2-MoE."""
    ops, h = s.ops, s.hyper
    x = ops.leaf("ffn_x", TensorType.F32, h.hidden_size, s.shape.num_tokens)
    y = s.linear("ffn_down_shexp", ops.swiglu(s.linear("ffn_gate_shexp", x), s.linear("ffn_up_shexp", x)))
    gate = ops.reshape(s.weight("ffn_gate_inp_shexp.weight"), h.hidden_size, 1)
    y = ops.mul(y, ops.sigmoid(ops.mul_mat(gate, x)))
    ops.expand(ops.add_inplace(_hidden(s, s.shape.num_tokens), y))


LayExpert = Callable[[StageBuilder, int, Tensor], Tensor]  # in place i of the graph, (hidden_size, R) → the same shape


def lay_experts(s: StageBuilder, shape: ExpertShape) -> None:
    """Gated experts: down(silu(gate(x)) * up(x) * weight), the weighted result with fewer elements to scale."""
    _lay_experts(s, shape, _expert)


def lay_clamped_experts(s: StageBuilder, shape: ExpertShape) -> None:
    """Experts with biases, whose gate and up are kept within a limit. Source: gpt-oss."""
    _lay_experts(s, shape, _clamped_expert)


def _lay_experts(s: StageBuilder, shape: ExpertShape, expert: LayExpert) -> None:
    if shape.sum is Sum.NOW:
        _add_results(s, shape)
    elif shape.sum is Sum.LATER:
        _keep_results(s, shape, expert)
    else:
        _add_to_hidden(s, shape, expert)


def _add_to_hidden(s: StageBuilder, shape: ExpertShape, expert: LayExpert) -> None:
    hidden, x = _hidden(s, shape.num_tokens), _ffn_x(s, shape)
    if shape.sum is Sum.AT_ONCE:
        for y in [expert(s, slot, x) for slot in range(shape.num_experts)]:
            hidden = s.ops.add_inplace(hidden, y)
    else:
        rows, out = _rows(s, 0, shape), _out(s, 0, shape)
        y = expert(s, 0, s.ops.get_rows(x, rows))
        hidden = s.ops.set_rows(hidden, s.ops.add(y, s.ops.get_rows(hidden, rows)), out)
    s.ops.expand(hidden)


def _keep_results(s: StageBuilder, shape: ExpertShape, expert: LayExpert) -> None:
    x, results = _ffn_x(s, shape), _expert_out(s, shape)
    for slot in range(shape.num_experts):
        y = expert(s, slot, s.ops.get_rows(x, _rows(s, slot, shape)))
        results = s.ops.set_rows(results, y, _out(s, slot, shape))
    s.ops.expand(results)


def _add_results(s: StageBuilder, shape: ExpertShape) -> None:
    hidden, results = _hidden(s, shape.num_tokens), _expert_out(s, shape)
    for rank in range(s.hyper.num_experts_per_tok):
        hidden = s.ops.add_inplace(hidden, s.ops.every_row(results, rank, s.hyper.num_experts_per_tok))
    s.ops.expand(hidden)


def _expert(s: StageBuilder, slot: int, x: Tensor) -> Tensor:
    gate, up = s.expert_linear("ffn_gate_exps", slot, x), s.expert_linear("ffn_up_exps", slot, x)
    return s.expert_linear("ffn_down_exps", slot, s.ops.mul(s.ops.swiglu(gate, up), _weights(s, slot, x)))


def _clamped_expert(s: StageBuilder, slot: int, x: Tensor) -> Tensor:
    gate, up = s.expert_linear("ffn_gate_exps", slot, x), s.expert_linear("ffn_up_exps", slot, x)
    y = s.expert_linear("ffn_down_exps", slot, s.ops.swiglu_clamped(gate, up, CLAMP_ALPHA, CLAMP_LIMIT))
    return s.ops.mul(y, _weights(s, slot, x))


def _weights(s: StageBuilder, slot: int, x: Tensor) -> Tensor:
    return s.ops.leaf(f"weights.{slot}", TensorType.F32, 1, x.shape[1])


def _rows(s: StageBuilder, slot: int, shape: ExpertShape) -> Tensor:
    return s.ops.leaf(f"rows.{slot}", TensorType.I32, shape.num_rows)


def _out(s: StageBuilder, slot: int, shape: ExpertShape) -> Tensor:
    return s.ops.leaf(f"out.{slot}", TensorType.I64, shape.num_rows)


def _ffn_x(s: StageBuilder, shape: ExpertShape) -> Tensor:
    return s.ops.leaf("ffn_x", TensorType.F32, s.hyper.hidden_size, shape.num_tokens)


def _expert_out(s: StageBuilder, shape: ExpertShape) -> Tensor:
    num_results = shape.num_tokens * s.hyper.num_experts_per_tok
    return s.ops.leaf("expert_out", TensorType.F32, s.hyper.hidden_size, num_results)


def _hidden(s: StageBuilder, num_tokens: int) -> Tensor:
    return s.ops.leaf("hidden", TensorType.F32, s.hyper.hidden_size, num_tokens)
