"""Tiny random Llama and Mistral checkpoints: transformers computes the truth, GGUF carries the weights.

The export follows llama.cpp's converter (names, order, metadata keys, q/k row order), written from its
documented results and proven by `tests/parity/test_export_loads.py`, which runs the files in llama.cpp.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType, RopeScalingType
from gguf import GGMLQuantizationType as GgufType
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.support import tiny_families, tiny_mixtures
from tests.support.tiny_vocab import Tokenizer, add_vocab

torch.set_num_threads(1)  # on matrices this small more threads only wait for each other

FloatArray = npt.NDArray[np.float32]
Family = Literal[
    "llama", "mistral", "mixtral", "olmoe", "qwen2moe", "qwen3moe", "gemma2", "gemma3", "opt", "phi3", "phi3-sliding",
    "qwen2", "qwen3", "smollm3", "gpt-oss",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class TinySpec:
    """What varies between the checkpoints. Sizes are multiples of 32, so that every quantised type fits."""

    family: Family = "llama"
    hidden_size: int = 64
    intermediate_size: int = 96
    num_layers: int = 2
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None  # None: hidden_size / num_q_heads, and the file does not say
    vocab_size: int = 320
    context_tokens: int = 256
    norm_epsilon: float = 1e-5
    is_tied: bool = False
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    sliding_window: int | None = None  # of Mistral
    num_experts: int = 8
    num_experts_per_tok: int = 2


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Original contexts of 64: with 8 to 16 frequencies some stay, some blend and some scale fully.
SPECS: Mapping[str, TinySpec] = {
    "llama": TinySpec(),
    "llama-mha": TinySpec(num_kv_heads=4),
    "llama-tied": TinySpec(is_tied=True, seed=1),
    "llama-bias": TinySpec(has_attention_bias=True, has_mlp_bias=True, seed=2),
    "llama-wide-heads": TinySpec(head_dim=32, seed=3),
    "llama-narrow-heads": TinySpec(head_dim=8, num_kv_heads=1, seed=4),
    "llama-deep": TinySpec(num_layers=12, seed=5),  # more than ten: names no longer sort by number
    "llama-linear": TinySpec(rope_scaling={"rope_type": "linear", "factor": 4.0}, seed=6),
    "llama-yarn": TinySpec(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, seed=7
    ),
    "llama-llama3": TinySpec(
        rope_theta=50000.0, rope_scaling={**_LLAMA3, "original_max_position_embeddings": 64}, is_tied=True, seed=8
    ),
    "mistral": TinySpec(family="mistral", head_dim=24, norm_epsilon=1e-6, rope_theta=1e6, seed=9),
    "mistral-sliding": TinySpec(family="mistral", sliding_window=40, seed=22),
    "mixtral": TinySpec(family="mixtral", num_layers=3, seed=10),
    "olmoe": TinySpec(family="olmoe", num_kv_heads=4, num_experts=16, num_experts_per_tok=4, seed=11),
    "qwen2moe": TinySpec(family="qwen2moe", num_experts=12, num_experts_per_tok=3, has_attention_bias=True, seed=12),
    "qwen3moe": TinySpec(family="qwen3moe", head_dim=32, num_experts=16, num_experts_per_tok=5, seed=13),
    "gpt-oss": TinySpec(family="gpt-oss", num_layers=3, head_dim=32, num_experts=12, num_experts_per_tok=3, seed=23),
    "gemma2": TinySpec(family="gemma2", num_layers=3, is_tied=True, head_dim=32, seed=14),
    "gemma3": TinySpec(family="gemma3", num_layers=7, is_tied=True, head_dim=32, seed=15),
    "opt": TinySpec(family="opt", num_kv_heads=4, is_tied=True, seed=16),
    "phi3": TinySpec(family="phi3", seed=17),
    "phi3-sliding": TinySpec(family="phi3-sliding", seed=18),
    "qwen2": TinySpec(family="qwen2", is_tied=True, rope_theta=1e6, seed=19),
    "qwen3": TinySpec(family="qwen3", head_dim=32, rope_theta=1e6, seed=20),
    "smollm3": TinySpec(family="smollm3", num_layers=5, is_tied=True, seed=21),
}
MIXTURES = ("mixtral", "olmoe", "qwen2moe", "qwen3moe", "gpt-oss")


def make_model(spec: TinySpec) -> PreTrainedModel:
    """A float32 model in eval mode whose weights depend on `spec` alone."""
    model: PreTrainedModel
    if spec.family == "mistral":
        model = MistralForCausalLM(_mistral_config(spec))
    elif spec.family in MIXTURES:
        model = tiny_mixtures.make_model(spec.family, _shared_config(spec), spec.num_experts, spec.num_experts_per_tok)
    elif spec.family in tiny_families.NAMES:
        model = tiny_families.make_model(spec.family, _shared_config(spec))
    else:
        model = LlamaForCausalLM(_llama_config(spec))
    _fill(model, spec)
    model.train(False)
    return model


def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> FloatArray:
    """Logits after every token. Shape: (tokens, vocab)."""
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits
    return np.asarray(logits[0].float().numpy(), dtype=np.float32)


def write_gguf(
    model: PreTrainedModel, path: Path, type: GgufType = GgufType.F32, *, tokenizer: Tokenizer = "spm"
) -> None:
    """Export as llama.cpp's converter would. `type` is one that gguf-py can quantise to (not a K-quant).

    Embeddings and head of a 4- or 5-bit file are Q8_0, where llama.cpp would use Q6_K.
    """
    writer = GGUFWriter(path, architecture_of(model))
    _add_metadata(writer, model, type)
    add_vocab(writer, tokenizer, model.config.vocab_size)
    for name, weight in exported_tensors(model):
        kind = stored_type(name, weight, type)
        writer.add_tensor(name, weight if kind is GgufType.F32 else quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded_model(model: PreTrainedModel, type: GgufType) -> PreTrainedModel:
    """A copy with every weight rounded as `write_gguf(model, …, type)` stores it: the oracle for that file."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            weight = parameter.numpy()
            kind = stored_type("experts" if ".experts." in name else _gguf_name(name, model.config), weight, type)
            parameter.copy_(torch.from_numpy(dequantize(quantize(weight, kind), kind)))
    return rounded


def stored_type(name: str, weight: FloatArray, type: GgufType) -> GgufType:
    """The type `write_gguf` gives this tensor: vectors and routers stay F32."""
    if weight.ndim == 1 or "ffn_gate_inp" in name:
        return GgufType.F32
    bits = 8 * GGML_QUANT_SIZES[type][1] / GGML_QUANT_SIZES[type][0]
    return GgufType.Q8_0 if bits < 8 and name in ("token_embd.weight", "output.weight") else type


def exported_tensors(model: PreTrainedModel) -> Iterator[tuple[str, FloatArray]]:
    """(GGUF name, values) in file order: the extra tensor, then as a safetensors file lists them."""
    config = model.config
    if tiny_families.rope_of(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3_freq_factors(_head_dim(config), config.rope_parameters)
    yield from tiny_families.extra_tensors(config)
    state = model.state_dict()
    for name in sorted(state):
        weight = state[name].numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            yield from tiny_mixtures.expert_tensors(name, weight, is_gpt_oss=config.model_type == "gpt_oss")
            continue
        if architecture_of(model) in PERMUTED and ".q_proj." in name:
            weight = pair_neighbours(weight, config.num_attention_heads)
        elif architecture_of(model) in PERMUTED and ".k_proj." in name:
            weight = pair_neighbours(weight, config.num_key_value_heads)
        elif name.endswith("shared_expert_gate.weight"):
            weight = weight.reshape(-1)
        yield _gguf_name(name, config), np.ascontiguousarray(tiny_families.changed(config, name, weight))


PERMUTED = ("llama", "smollm3")  # rows of q and k, by the converter


def architecture_of(model: PreTrainedModel) -> str:
    """As llama.cpp names it."""
    kind: str = model.config.model_type
    known = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", **tiny_families.ARCHITECTURES}
    return known.get(kind, "llama" if kind in ("mistral", "mixtral") else kind)


def pair_neighbours(weight: FloatArray, num_heads: int) -> FloatArray:
    """Reorder a head's output rows from (first halves, second halves) to rotated pairs side by side."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(np.moveaxis(halves, 1, 2)).reshape(weight.shape)


def llama3_freq_factors(head_dim: int, rope: Mapping[str, Any]) -> FloatArray:
    """The divisor of each rotary frequency: 1 for short waves, `factor` for long ones, a blend between."""
    freqs = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    waves = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)  # in the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - kept) / rope["factor"] + kept), dtype=np.float32)


def _llama_config(spec: TinySpec) -> LlamaConfig:
    return LlamaConfig(attention_bias=spec.has_attention_bias, mlp_bias=spec.has_mlp_bias, **_shared_config(spec))


def _mistral_config(spec: TinySpec) -> MistralConfig:
    if spec.has_attention_bias or spec.has_mlp_bias:
        raise ValueError("Mistral has no biases")
    return MistralConfig(sliding_window=spec.sliding_window, **_shared_config(spec))


def _shared_config(spec: TinySpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_q_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim or spec.hidden_size // spec.num_q_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": spec.norm_epsilon,
        "tie_word_embeddings": spec.is_tied,
        "rope_parameters": {"rope_type": "default", **spec.rope_scaling, "rope_theta": spec.rope_theta},
        "attn_implementation": "eager",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _fill(model: PreTrainedModel, spec: TinySpec) -> None:
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            mean, scale = _mean_and_scale(name, tuple(parameter.shape), is_tied=spec.is_tied)
            parameter.copy_(mean + scale * noise)


def _mean_and_scale(name: str, shape: tuple[int, ...], *, is_tied: bool) -> tuple[float, float]:
    """Scales that make a fault visible: attention scores with a deviation near 2, logits near 2 or 3."""
    if name.endswith("norm.weight"):
        return 1.0, 0.2
    if name.endswith(".bias"):
        return 0.0, 0.3
    if "embed_tokens" in name or "embed_positions" in name:
        return 0.0, 0.3 if is_tied else 1.0
    gain = {"q_proj": 1.4, "k_proj": 1.4, "lm_head": 2.0, "gate": 2.0, "router": 2.0}.get(name.split(".")[-2], 1.0)
    return 0.0, gain / math.sqrt(shape[-1])


def _add_metadata(writer: GGUFWriter, model: PreTrainedModel, type: GgufType) -> None:
    config = model.config
    writer.add_type("model")
    # llama.cpp wants the special tokens of a Phi-3 of what is called one
    writer.add_name("tiny" if config.model_type == "phi3" else f"tiny {config.model_type}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_dim if config.model_type == "opt" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    tiny_mixtures.add_metadata(writer, config)
    tiny_families.add_metadata(writer, config)
    if config.model_type == "opt":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        _add_rope(writer, tiny_families.rope_of(config))
        writer.add_rope_dimension_count(tiny_families.num_rotated(config, _head_dim(config)))
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
    writer.add_file_type(_FILE_TYPES[type])
    writer.add_vocab_size(config.vocab_size)
    if type not in (GgufType.F32, GgufType.F16, GgufType.BF16):
        writer.add_quantization_version(2)


def _add_rope(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_freq_base(rope["rope_theta"])


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _gguf_name(name: str, config: Any) -> str:
    """`model.layers.3.self_attn.q_proj.bias` → `blk.3.attn_q.bias`."""
    own, name = tiny_families.names_of(config), name.replace("self_attn.sinks", "self_attn.sinks.weight")
    module, _, kind = name.removeprefix("model.").removeprefix("decoder.").rpartition(".")
    if not module.startswith("layers."):
        return f"{ {**_TOP_NAMES, **own.top}[module] }.{kind}"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{ {**_BLOCK_NAMES, **own.block}[part] }.{kind}"


_TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_FILE_TYPES = {
    GgufType.F32: LlamaFileType.ALL_F32,
    GgufType.F16: LlamaFileType.MOSTLY_F16,
    GgufType.BF16: LlamaFileType.MOSTLY_BF16,
    GgufType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GgufType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GgufType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GgufType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GgufType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GgufType.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}
