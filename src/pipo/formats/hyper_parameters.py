"""GGUF's hyper-parameter keys, under llama.cpp's names, → HyperParameters.

Source: `llama_model::load_hparams` and the `llama_context` constructor of llama.cpp, for the names, the defaults and
what a value means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.manifest import EMBEDDING_TABLE, HyperParameters, Rope, RopeLayout, RopeScaling, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.formats.arch_keys import MAX_SIZE, ArchKeys
from pipo.formats.gguf_metadata import ArrayRef, GgufMetadata
from pipo.formats.layer_kinds import with_layer_kinds

MAX_LAYERS = 10_000
MAX_EXPERTS = 4096  # of a block; 512 are the most in files so far
ROPE_FREQS, ROPE_SHORT, ROPE_LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"

# llama.cpp's converter permutes the rows of q and k of these: their rotated pairs are neighbours, in all others halves.
# Source: `llama_model_rope_type` of llama.cpp
PERMUTED = frozenset({"llama", "smollm3"})
_ROPE_SCALINGS = {
    "none": RopeScaling.NONE,
    "linear": RopeScaling.LINEAR,
    "yarn": RopeScaling.YARN,
    "longrope": RopeScaling.LONGROPE,
}


def read_hyper_parameters(
    metadata: GgufMetadata, tensors: Mapping[str, TensorSpec]
) -> tuple[HyperParameters, dict[str, object]]:
    """Also returns the architecture's keys that have no field.

    Raises UnsupportedModel for an architecture that is not in the table, or what HyperParameters cannot say.
    """
    keys = ArchKeys(metadata, _architecture(metadata))
    num_layers = keys.size("block_count", most=MAX_LAYERS)
    hidden_size = keys.size("embedding_length")
    num_q_heads = keys.size("attention.head_count", per_layer=num_layers)
    head_dim = _head_dim(keys, hidden_size, num_q_heads)
    context_tokens = keys.size("context_length")
    num_experts = keys.count("expert_count", most=MAX_EXPERTS)
    hyper = HyperParameters(
        architecture=keys.architecture,
        hidden_size=hidden_size,
        intermediate_size=keys.size("feed_forward_length", per_layer=num_layers),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=_num_kv_heads(keys, num_q_heads, num_layers),
        head_dim=head_dim,
        vocab_size=_vocab_size(keys, tensors),
        context_tokens=context_tokens,
        norm_epsilon=_norm_epsilon(keys),
        rope=_rope(keys, head_dim, context_tokens, tensors),
        num_experts=num_experts,
        num_experts_per_tok=_num_experts_per_tok(keys, num_experts),
        expert_size=keys.count("expert_feed_forward_length"),
        shared_expert_size=keys.count("expert_shared_feed_forward_length"),
    )
    return with_layer_kinds(hyper, keys), keys.left_over()


def _architecture(metadata: GgufMetadata) -> str:
    architecture = metadata.text("general.architecture")
    if not architecture:
        raise MalformedFile(f"{metadata.path}: key 'general.architecture' is missing, wanted the model's family")
    return architecture


def rope_layout(architecture: str) -> RopeLayout:
    """Of the rows of q and k in a GGUF."""
    return RopeLayout.NORMAL if architecture in PERMUTED else RopeLayout.NEOX


def _head_dim(keys: ArchKeys, hidden_size: int, num_q_heads: int) -> int:
    key_length, value_length = keys.size_or_none("attention.key_length"), keys.size_or_none("attention.value_length")
    if (key_length is None or value_length is None) and hidden_size % num_q_heads:
        raise keys.wrong("attention.head_count", str(num_q_heads), f"a divisor of the hidden size {hidden_size}")
    key_length = hidden_size // num_q_heads if key_length is None else key_length
    value_length = hidden_size // num_q_heads if value_length is None else value_length
    if key_length != value_length:
        raise UnsupportedModel(
            f"{keys.metadata.path}: keys of {key_length} and values of {value_length} elements a head: "
            "pipo implements equal ones"
        )
    return key_length


def _num_kv_heads(keys: ArchKeys, num_q_heads: int, num_layers: int) -> int:
    num_kv_heads = keys.size_or_none("attention.head_count_kv", per_layer=num_layers) or num_q_heads
    if num_q_heads % num_kv_heads:
        raise keys.wrong("attention.head_count_kv", str(num_kv_heads), f"a divisor of the {num_q_heads} heads")
    return num_kv_heads


def _num_experts_per_tok(keys: ArchKeys, num_experts: int) -> int:
    used = keys.count("expert_used_count", most=MAX_EXPERTS)
    if bool(used) is not bool(num_experts) or used > num_experts:
        wanted = f"a count from 1 to the {num_experts} there are" if num_experts else "0, as there are no experts"
        raise keys.wrong("expert_used_count", str(used), wanted)
    return used


def _vocab_size(keys: ArchKeys, tensors: Mapping[str, TensorSpec]) -> int:
    vocab_size = keys.size_or_none("vocab_size")
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    embedding = tensors.get(EMBEDDING_TABLE)
    if vocab_size is not None:
        return vocab_size
    if isinstance(tokens, ArrayRef) and 1 <= tokens.count <= MAX_SIZE:
        return tokens.count
    if embedding is not None and len(embedding.shape) == 2 and embedding.shape[1] <= MAX_SIZE:
        return embedding.shape[1]
    raise keys.wrong("vocab_size", "missing", "it, or tokenizer.ggml.tokens, or token_embd.weight of 2 dimensions")


def _norm_epsilon(keys: ArchKeys) -> float:
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        epsilon = keys.number_or_none(name, 0.0, 1.0)
        if epsilon is None:
            continue
        if not 0 < epsilon < 1:
            raise keys.wrong(name, str(epsilon), "a number between 0 and 1")
        return epsilon
    raise keys.wrong("attention.layer_norm_rms_epsilon", "missing", "a number between 0 and 1")


def _rope(keys: ArchKeys, head_dim: int, context_tokens: int, tensors: Mapping[str, TensorSpec]) -> Rope:
    num_dims = keys.size_or_none("rope.dimension_count") or head_dim
    if num_dims % 2 or num_dims > head_dim:
        raise keys.wrong("rope.dimension_count", str(num_dims), f"an even count up to the head's {head_dim}")
    base = keys.number("rope.freq_base", 10_000.0, least=1.0, most=1e12)
    if base == 1.0:
        raise keys.wrong("rope.freq_base", "1", "more than 1")
    scaling, factor = _scaling(keys)
    by_tensors = _scaling_by_tensors(keys, tensors, num_dims)
    if by_tensors is not None:
        if scaling not in (RopeScaling.NONE, by_tensors):
            raise UnsupportedModel(
                f"{keys.metadata.path}: has {by_tensors.value!r} tensors and rope scaling {scaling.value!r}: "
                "pipo implements either"
            )
        scaling, factor = by_tensors, 1.0
    elif scaling is RopeScaling.LONGROPE:
        raise MalformedFile(f"{keys.metadata.path}: rope scaling 'longrope' without {ROPE_SHORT!r} and {ROPE_LONG!r}")
    original_tokens = keys.size_or_none("rope.scaling.original_context_length")
    rope = Rope(
        num_dims=num_dims,
        base=base,
        layout=rope_layout(keys.architecture),
        scaling=scaling,
        factor=factor,
        original_context_tokens=original_tokens or context_tokens,
        attn_factor=keys.number("rope.scaling.attn_factor", 1.0, least=1e-3, most=1e3),
        ext_factor=0.0,
    )
    keys.ignore("rope.scaling.finetuned")  # a remark
    return _yarn(keys, rope) if scaling is RopeScaling.YARN else rope


def _scaling(keys: ArchKeys) -> tuple[RopeScaling, float]:
    name = keys.text("rope.scaling.type", "linear")
    scaling = _ROPE_SCALINGS.get(name)
    if scaling is None:
        raise UnsupportedModel(
            f"{keys.metadata.path}: rope scaling {name!r:.80} is not implemented",
            hint=f"known are {', '.join(_ROPE_SCALINGS)}",
        )
    factor = keys.number_or_none("rope.scaling.factor", least=0.0, most=1e6)
    old_factor = keys.number_or_none("rope.scale_linear", least=0.0, most=1e6)
    factor = (old_factor if factor is None else factor) or 1.0  # 0 means not scaled
    if scaling is RopeScaling.YARN and factor < 1:
        raise keys.wrong("rope.scaling.factor", str(factor), "at least 1 with YaRN")
    if scaling is RopeScaling.NONE or (scaling is RopeScaling.LINEAR and factor == 1):
        return RopeScaling.NONE, 1.0
    return scaling, factor


def _yarn(keys: ArchKeys, rope: Rope) -> Rope:
    """Fill in what YaRN adds.

    ggml's rope multiplies the magnitude by 1 + 0.1 ln(factor) whenever ext_factor is not 0, on top of the attn_factor
    it is given. That is the paper's value, so the plain case passes 1. A file with `yarn_log_multiplier` (the
    `mscale_all_dim` of Hugging Face configs) wants (1 + 0.1 ln f) / (1 + 0.1 m ln f) in all, so it passes
    1 / (1 + 0.1 m ln f). Source: https://github.com/ggml-org/llama.cpp/pull/17945.
    """
    ext_factor = keys.number("rope.scaling.yarn_ext_factor", -1.0, least=-1.0, most=1.0)
    ext_factor = 1.0 if ext_factor < 0 else ext_factor  # negative means not set
    magnitude = keys.number("rope.scaling.yarn_attn_factor", 1.0, least=1e-3, most=1e3)
    log_multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0, most=1e3)
    if ext_factor and magnitude != 1:
        # llama.cpp computes it and drops the file's value; what a file that sets it means is not settled.
        raise UnsupportedModel(
            f"{keys.metadata.path}: key {keys.full('rope.scaling.yarn_attn_factor')!r} is {magnitude}, wanted 1"
        )
    if ext_factor:
        magnitude = 1 / (1 + 0.1 * log_multiplier * log(rope.factor))
    return replace(
        rope,
        attn_factor=rope.attn_factor * magnitude,
        ext_factor=ext_factor,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, least=1e-3, most=1e6),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, least=1e-3, most=1e6),
    )


def _scaling_by_tensors(keys: ArchKeys, tensors: Mapping[str, TensorSpec], num_dims: int) -> RopeScaling | None:
    """Divisors of the frequencies, which some files hold as tensors."""
    named = [tensors[name] for name in (ROPE_FREQS, ROPE_SHORT, ROPE_LONG) if name in tensors]
    for factors in named:
        _check_factors(keys, factors, num_dims)
    if not named:
        return None
    if ROPE_FREQS in tensors and len(named) == 1:
        return RopeScaling.FREQ_FACTORS
    if ROPE_FREQS in tensors or len(named) == 1:
        raise MalformedFile(
            f"{keys.metadata.path}: has {', '.join(repr(each.name) for each in named)}, wanted {ROPE_FREQS!r} alone, "
            f"or {ROPE_SHORT!r} and {ROPE_LONG!r}"
        )
    return RopeScaling.LONGROPE


def _check_factors(keys: ArchKeys, factors: TensorSpec, num_dims: int) -> None:
    """ggml ends the process when the divisors are not F32 or too few."""
    if factors.type is not TensorType.F32 or factors.shape != (num_dims // 2,):
        raise MalformedFile(
            f"{keys.metadata.path}: tensor {factors.name!r} is {factors.type.name} {factors.shape}, "
            f"wanted F32 {(num_dims // 2,)}"
        )
