"""OPT, the family of the PIPO and FlexGen papers: learned positions, LayerNorm, ReLU, biases throughout.

llama.cpp has no such architecture; tensors are named as its GPT-2 has them. Row 0 of `position_embd.weight` is the
first token's. Source: OPTForCausalLM of transformers, with `do_layer_norm_before`.
"""

from __future__ import annotations

from dataclasses import replace

from pipo.base.manifest import EMBEDDING_TABLE, HyperParameters, Manifest, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.compute.views import Tensor
from pipo.models.attention import mix
from pipo.models.blocks import lay_head
from pipo.models.checks import TensorBook, refuse_unknown_keys
from pipo.models.parts import HARMLESS_KEYS
from pipo.models.stage import Stage, StageBuilder, StageKind


def opt_stages(manifest: Manifest) -> list[Stage]:
    h = manifest.hyper
    refuse_unknown_keys(manifest, HARMLESS_KEYS)
    book = TensorBook(manifest)
    stages = [stage for i in range(h.num_layers) for stage in (_attention(book, h, i), _mlp(book, h, i))]
    stages[0] = replace(stages[0], vectors={**stages[0].vectors, **_positions(book, h)}, lay=_lay_first_attention)
    head = book.optional_matrix("output.weight", h.hidden_size, h.vocab_size)
    head = head or book.matrix(EMBEDDING_TABLE, h.hidden_size, h.vocab_size)
    norm = _norm(book, "output_norm", h.hidden_size)
    stages += [
        Stage(StageKind.FINAL_NORM, -1, {}, norm, _lay_final_norm),
        Stage(StageKind.HEAD, -1, {"output.weight": head}, {}, lay_head),
    ]
    book.refuse_leftovers()
    return stages


def _attention(book: TensorBook, h: HyperParameters, i: int) -> Stage:
    square = h.hidden_size, h.hidden_size
    linears = book.linears(i, attn_q=square, attn_k=square, attn_v=square, attn_output=square)
    vectors = _norm(book, f"blk.{i}.attn_norm", h.hidden_size) | linears.biases
    return Stage(StageKind.ATTENTION, i, linears.matrices, vectors, _lay_attention)


def _mlp(book: TensorBook, h: HyperParameters, i: int) -> Stage:
    sizes = h.hidden_size, h.intermediate_size
    linears = book.linears(i, ffn_up=sizes, ffn_down=sizes[::-1])
    vectors = _norm(book, f"blk.{i}.ffn_norm", h.hidden_size) | linears.biases
    return Stage(StageKind.MLP, i, linears.matrices, vectors, _lay_mlp)


def _norm(book: TensorBook, name: str, size: int) -> dict[str, TensorSpec]:
    """Weight and bias, by what follows the name of the block."""
    role = name.split(".")[-1]
    return {f"{role}.{part}": book.vector(f"{name}.{part}", size) for part in ("weight", "bias")}


def _positions(book: TensorBook, h: HyperParameters) -> dict[str, TensorSpec]:
    return {"position_embd.weight": book.table("position_embd.weight", h.hidden_size, h.context_tokens)}


def _lay_first_attention(s: StageBuilder) -> None:
    """hidden += position embeddings, then attention."""
    positions = s.ops.leaf("positions", TensorType.I32, s.shape.num_tokens)
    rows = s.ops.get_rows(s.weight("position_embd.weight"), positions)
    _add_attention(s, s.ops.add_inplace(_hidden(s), rows))


def _lay_attention(s: StageBuilder) -> None:
    _add_attention(s, _hidden(s))


def _add_attention(s: StageBuilder, hidden: Tensor) -> None:
    h, x = s.hyper, s.layer_norm("attn_norm", hidden)
    heads = h.head_dim, h.num_q_heads, s.shape.num_tokens
    q, k = (s.ops.reshape(s.linear(role, x), *heads) for role in ("attn_q", "attn_k"))
    mixed = mix(s, q, k, s.linear("attn_v", x), "mask")
    s.ops.expand(s.ops.add_inplace(hidden, s.linear("attn_output", mixed)))


def _lay_mlp(s: StageBuilder) -> None:
    """hidden += down(relu(up(x))), x = norm(hidden)."""
    hidden = _hidden(s)
    y = s.ops.relu(s.linear("ffn_up", s.layer_norm("ffn_norm", hidden)))
    s.ops.expand(s.ops.add_inplace(hidden, s.linear("ffn_down", y)))


def _lay_final_norm(s: StageBuilder) -> None:
    rows = s.ops.leaf("out_rows", TensorType.I32, s.shape.num_outputs)
    chosen = s.ops.get_rows(_hidden(s), rows)
    s.ops.expand(s.ops.output("normed", s.layer_norm("output_norm", chosen)))


def _hidden(s: StageBuilder) -> Tensor:
    return s.ops.leaf("hidden", TensorType.F32, s.hyper.hidden_size, s.shape.num_tokens)
