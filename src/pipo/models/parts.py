"""Runs of stages that families share: which tensors they take, under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pipo.base.manifest import EMBEDDING_TABLE, HyperParameters, Manifest, RopeScaling, TensorSpec
from pipo.models.blocks import (
    lay_attention,
    lay_final_norm,
    lay_fused_mlp,
    lay_gated_mlp,
    lay_head,
    lay_sliding_attention,
    lay_unrotated_attention,
)
from pipo.models.checks import TensorBook, refuse_unknown_keys
from pipo.models.experts import (
    lay_attention_and_router,
    lay_experts,
    lay_shared_expert,
    lay_sliding_attention_and_router,
)
from pipo.models.stage import ExpertBank, ExpertShape, Stage, StageBuilder, StageKind

# keys that change nothing as long as they say this
HARMLESS_KEYS: dict[str, object] = {"attention.causal": True, "use_parallel_residual": False}
# keys of a mixture that change nothing as long as they say this
MIXTURE_KEYS: dict[str, object] = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_gating_func": 1,  # softmax, of llama.cpp's `llama_expert_gating_func_type`
}


ROPE_VECTORS = {
    RopeScaling.FREQ_FACTORS: ("rope_freqs.weight",),
    RopeScaling.LONGROPE: ("rope_factors_short.weight", "rope_factors_long.weight"),
}


def decoder(
    manifest: Manifest, harmless: Mapping[str, object], block: Callable[[TensorBook, int], list[Stage]]
) -> list[Stage]:
    """The stages of every block, then the output. `harmless` are keys that change nothing as long as they say this.

    Raises UnsupportedModel, MalformedFile.
    """
    refuse_unknown_keys(manifest, harmless)
    book = TensorBook(manifest)
    stages = [stage for i in range(manifest.hyper.num_layers) for stage in block(book, i)]
    stages += output_stages(book, manifest)
    book.refuse_leftovers()
    return stages


def llama_like(manifest: Manifest, harmless: Mapping[str, object] = HARMLESS_KEYS, **norms: int) -> list[Stage]:
    """Attention and a gated MLP in every block. `norms` are those of attention besides `attn_norm`."""
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        return [attention(book, h, i, **norms), gated_mlp(book, h, i)]

    return decoder(manifest, harmless, block)


def attention(book: TensorBook, hyper: HyperParameters, i: int, **norms: int) -> Stage:
    """Grouped-query attention, sliding or without rotary embedding where the layer is. `norms` are the vectors that the
    family has besides `attn_norm`, with their sizes. Queries, keys and values may come out of one matrix.
    """
    hidden, q_size, kv_size = hyper.hidden_size, hyper.num_q_heads * hyper.head_dim, hyper.num_kv_heads * hyper.head_dim
    inputs = {"attn_q": (hidden, q_size), "attn_k": (hidden, kv_size), "attn_v": (hidden, kv_size)}
    if book.has(f"blk.{i}.attn_qkv.weight"):
        inputs = {"attn_qkv": (hidden, q_size + 2 * kv_size)}
    linears = book.linears(i, **inputs, attn_output=(q_size, hidden))
    vectors = _vectors(book, i, attn_norm=hidden, **norms) | _rope_vectors(book, hyper)
    return Stage(StageKind.ATTENTION, i, linears.matrices, vectors | linears.biases, _lay_of(hyper, i))


def _lay_of(hyper: HyperParameters, i: int) -> Callable[[StageBuilder], None]:
    if hyper.unrotated_layers and hyper.unrotated_layers[i]:
        return lay_unrotated_attention
    return lay_sliding_attention if hyper.sliding_layers and hyper.sliding_layers[i] else lay_attention


def _rope_vectors(book: TensorBook, hyper: HyperParameters) -> dict[str, TensorSpec]:
    """Divisors of rotary frequencies. Those of long contexts are loaded whichever the context turns out to be."""
    names = ROPE_VECTORS.get(hyper.rope.scaling, ())
    return {name: book.vector(name, hyper.rope.num_dims // 2) for name in names}


def _vectors(book: TensorBook, i: int, **sizes: int) -> dict[str, TensorSpec]:
    return {f"{role}.weight": book.vector(f"blk.{i}.{role}.weight", size) for role, size in sizes.items()}


def gated_mlp(
    book: TensorBook,
    hyper: HyperParameters,
    i: int,
    lay: Callable[[StageBuilder], None] = lay_gated_mlp,
    **norms: int,
) -> Stage:
    """`norms` are those besides `ffn_norm`."""
    sizes = hyper.hidden_size, hyper.intermediate_size
    linears = book.linears(i, ffn_gate=sizes, ffn_up=sizes, ffn_down=sizes[::-1])
    vectors = _vectors(book, i, ffn_norm=hyper.hidden_size, **norms)
    return Stage(StageKind.MLP, i, linears.matrices, vectors | linears.biases, lay)


def fused_mlp(book: TensorBook, hyper: HyperParameters, i: int) -> Stage:
    """Gate and up in one matrix."""
    hidden, size = hyper.hidden_size, hyper.intermediate_size
    linears = book.linears(i, ffn_up=(hidden, 2 * size), ffn_down=(size, hidden))
    vectors = _vectors(book, i, ffn_norm=hidden)
    return Stage(StageKind.MLP, i, linears.matrices, vectors | linears.biases, lay_fused_mlp)


def routed_experts(
    book: TensorBook,
    hyper: HyperParameters,
    attention: Stage,
    expert_size: int,
    *,
    renormalise: bool,
    lay: Callable[[StageBuilder, ExpertShape], None] = lay_experts,
    norm: str = "ffn_norm",
) -> list[Stage]:
    """The attention of a block with the routers of this block and the next, and the experts. `norm` is the name of what
    both read.
    """
    i = attention.block_idx
    book.refuse_dense()
    hidden, num = hyper.hidden_size, hyper.num_experts
    shapes = {
        "ffn_gate_exps": (hidden, expert_size),
        "ffn_up_exps": (hidden, expert_size),
        "ffn_down_exps": (expert_size, hidden),
    }
    matrices = {f"{role}.weight": book.experts(f"blk.{i}.{role}.weight", *shape, num) for role, shape in shapes.items()}
    biases = {
        f"{role}.bias": book.table(f"blk.{i}.{role}.bias", shape[1], num)
        for role, shape in shapes.items()
        if book.has(f"blk.{i}.{role}.bias")
    }
    bank = ExpertBank(matrices, num, hyper.num_experts_per_tok, renormalise, lay, biases)
    vectors = {**attention.vectors, **_router(book, hyper, i, norm)}
    if i + 1 < hyper.num_layers:
        vectors |= {f"next_{role}": spec for role, spec in _router(book, hyper, i + 1, norm).items()}
    return [
        replace(attention, vectors=vectors, lay=_WITH_ROUTER[attention.lay]),
        Stage(StageKind.EXPERTS, i, {}, biases, _no_graph, bank),
    ]


_WITH_ROUTER: dict[Callable[[StageBuilder], None], Callable[[StageBuilder], None]] = {
    lay_attention: lay_attention_and_router,
    lay_sliding_attention: lay_sliding_attention_and_router,
}


def share_of_mlp(hyper: HyperParameters) -> int:
    """Size of an expert in files that do not say: a token's experts together are an MLP. Source: llama.cpp, Qwen."""
    return hyper.expert_size or hyper.intermediate_size // max(hyper.num_experts_per_tok, 1)


def _router(book: TensorBook, hyper: HyperParameters, i: int, norm: str) -> dict[str, TensorSpec]:
    gate = book.linears(i, ffn_gate_inp=(hyper.hidden_size, hyper.num_experts))
    return {
        "ffn_norm.weight": book.vector(f"blk.{i}.{norm}.weight", hyper.hidden_size),
        **gate.matrices,
        **gate.biases,
    }


def _no_graph(s: object) -> None:
    raise AssertionError("experts are laid by their bank")


def shared_expert(book: TensorBook, hyper: HyperParameters, i: int, size: int) -> Stage:
    """The expert that every token of block `i` passes."""
    hidden = hyper.hidden_size
    linears = book.linears(i, ffn_gate_shexp=(hidden, size), ffn_up_shexp=(hidden, size), ffn_down_shexp=(size, hidden))
    gate = {"ffn_gate_inp_shexp.weight": book.vector(f"blk.{i}.ffn_gate_inp_shexp.weight", hidden)}
    return Stage(StageKind.MLP, i, linears.matrices, gate | linears.biases, lay_shared_expert)


def output_stages(book: TensorBook, manifest: Manifest) -> list[Stage]:
    """The final norm, and the head, which is the embedding table where the file has no other."""
    h = manifest.hyper
    embedding = book.matrix(EMBEDDING_TABLE, h.hidden_size, h.vocab_size)
    head = book.optional_matrix("output.weight", h.hidden_size, h.vocab_size) or embedding
    norm = book.vector("output_norm.weight", h.hidden_size)
    return [
        Stage(StageKind.FINAL_NORM, -1, {}, {"output_norm.weight": norm}, lay_final_norm),
        Stage(StageKind.HEAD, -1, {"output.weight": head}, {}, lay_head),
    ]
