"""A Hugging Face folder of a Llama of one block, made without transformers, so that a test can get any part wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.hf_folders import write_tokenizer
from tests.support.safetensors_bytes import file_with

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 32, 64, 4, 2, 320
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}


def arrays_of(shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in (shapes or SHAPES).items()}


def write_folder(folder: Path, arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """One file of weights. `changes` are of config.json, where None takes a field away."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(file_with(arrays_of() if arrays is None else arrays))
    write_config(folder, **changes)
    write_tokenizer(folder, "gpt2", VOCAB)
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    fields = {name: value for name, value in (CONFIG | changes).items() if value is not None or name not in CONFIG}
    (folder / "config.json").write_text(json.dumps(fields))


def write_sharded(folder: Path, num_shards: int = 3) -> Path:
    """The same, tensor by tensor dealt out to shards."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for idx in range(num_shards):
        name = f"model-{idx + 1:05}-of-{num_shards:05}.safetensors"
        part = {tensor: array for i, (tensor, array) in enumerate(arrays_of().items()) if i % num_shards == idx}
        (folder / name).write_bytes(file_with(part))
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_map_of(folder: Path) -> dict[str, str]:
    index: dict[str, dict[str, str]] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index["weight_map"]
