"""The weights of a random model once more, as a Hugging Face folder: for engines that read no GGUF.

The same tensors as `write_random_model` writes in BF16, and the same answers: only the rows of `attn_q` and `attn_k`
lie in another order: GGUF keeps the two halves of a rotated pair side by side, Hugging Face half a head apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.random_model import MIXES, SHAPES, Shape, Tensor, UncachedWriter, plan_tensors, random_data

_NAMES = {
    "output": "lm_head",
    "output_norm": "model.norm",
    "token_embd": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ONE = 0x3F80  # 1.0 in BF16: norms are F32 in the GGUF, and lose nothing here


def write_random_checkpoint(folder: Path, shape: str, *, seed: int = 0) -> int:
    """Write config, tokenizer and weights in BF16, and return the size of the weights in bytes."""
    model = SHAPES[shape]
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config(model))
    _write_json(folder / "tokenizer.json", _tokenizer(model.vocab_size))
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>"})
    return _write_weights(folder / "model.safetensors", model, seed)


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    *block, part, suffix = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_NAMES[part]}.{suffix}"


def _write_weights(path: Path, model: Shape, seed: int) -> int:
    tensors = list(plan_tensors(model, MIXES["bf16"]))
    header = json.dumps(_header(tensors)).encode()
    header += b" " * (-len(header) % 8)
    path.touch()
    with UncachedWriter(path) as out:
        out.write(memoryview(len(header).to_bytes(8, "little") + header))
        for tensor, chunks in random_data(tensors, seed):
            for chunk in _as_stored(tensor, chunks, model):
                out.write(chunk)
    return path.stat().st_size


def _header(tensors: Sequence[Tensor]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + 2 * int(np.prod(tensor.shape))
        entry = {"dtype": "BF16", "shape": list(reversed(tensor.shape)), "data_offsets": [begin, end]}
        header[hf_name(tensor.name)] = entry
    return header


def _as_stored(tensor: Tensor, chunks: Iterator[memoryview], model: Shape) -> Iterator[memoryview]:
    num_heads = {"attn_q": model.num_q_heads, "attn_k": model.num_kv_heads}.get(tensor.name.split(".")[-2])
    if tensor.deviation is None:
        yield np.full(tensor.shape, _ONE, "<u2").data.cast("B")
    elif num_heads is None:
        yield from chunks
    else:
        rows = np.frombuffer(b"".join(chunks), "<u2").reshape(tensor.shape[::-1])
        yield halves_apart(rows, num_heads).data.cast("B")


def halves_apart(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """From the order of GGUF to that of Hugging Face. Shape of both: (heads · head_dim, hidden)."""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _config(model: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_q_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """A word for each id: engines want to load one, and are given ids."""
    words = {f"<{token_id}>": token_id for token_id in range(vocab_size)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<0>"},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
