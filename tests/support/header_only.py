"""Files that end where their weights would begin: what is on a disk before a download has brought the rest."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pipo.base.tensor_type import TensorType
from tests.support.gguf_bytes import (
    FLOAT32,
    STRING,
    UINT32,
    GgufBytes,
    array_key,
    count_key,
    llama_keys,
    string,
    tensor,
    text_key,
    u32,
    write,
)
from tests.support.tiny_vocab import build_vocab

ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Header:
    """A Llama. The defaults are those of a 7B."""

    num_layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_q_heads: int = 32
    num_kv_heads: int = 32
    vocab_size: int = 32000
    context_tokens: int = 32768
    type: TensorType = TensorType.Q4_0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, m = self.hidden_size, self.intermediate_size
        kv = h // self.num_q_heads * self.num_kv_heads
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (h,), "attn_q": (h, h), "attn_k": (h, kv), "attn_v": (h, kv), "attn_output": (h, h),
            "ffn_norm": (h,), "ffn_gate": (h, m), "ffn_up": (h, m), "ffn_down": (m, h),
        }  # fmt: skip
        blocks = {f"blk.{i}.{name}": shape for i in range(self.num_layers) for name, shape in block.items()}
        return {"token_embd": (h, self.vocab_size), **blocks, "output_norm": (h,), "output": (h, self.vocab_size)}


LLAMA_7B = Header()
LLAMA_70B = Header(80, 8192, 28672, 64, 8, 128256)


def write_header(folder: Path, header: Header = LLAMA_7B, name: str = "model.gguf") -> Path:
    """No byte of a weight, and none of the padding before them either."""
    tensors, offset = [], 0
    for tensor_name, shape in header.shapes.items():
        type_ = header.type if len(shape) > 1 else TensorType.F32
        tensors.append(tensor(f"{tensor_name}.weight", shape, int(type_), offset))
        offset += -(-_num_bytes(type_, shape) // ALIGNMENT) * ALIGNMENT
    return write(folder, bytes(GgufBytes(_keys(header), tensors, alignment=1)), name)


def sparse(path: Path, num_bytes: int) -> Path:
    """Grown to its full length without a byte being there."""
    with path.open("r+b") as stream:
        stream.truncate(num_bytes)
    return path


def _num_bytes(type_: TensorType, shape: tuple[int, ...]) -> int:
    return prod(shape) // type_.block_elems * type_.block_bytes


def _keys(header: Header) -> list[bytes]:
    vocab = build_vocab("spm", 300)
    counts = {
        "block_count": header.num_layers, "embedding_length": header.hidden_size,
        "feed_forward_length": header.intermediate_size, "context_length": header.context_tokens,
    }  # fmt: skip
    heads = {"head_count": header.num_q_heads, "head_count_kv": header.num_kv_heads}
    changes: dict[str, bytes | None] = {name: count_key(f"llama.{name}", value) for name, value in counts.items()}
    changes |= {name: count_key(f"llama.attention.{name}", value) for name, value in heads.items()}
    changes["tokens"] = array_key("tokenizer.ggml.tokens", STRING, [string(token) for token in vocab.tokens])
    scores = [struct.pack("<f", score) for score in vocab.scores]
    changes["scores"] = array_key("tokenizer.ggml.scores", FLOAT32, scores)
    types = array_key("tokenizer.ggml.token_type", UINT32, [u32(type_) for type_ in vocab.types])
    vocab_size = count_key("llama.vocab_size", header.vocab_size)
    return [*llama_keys(**changes), vocab_size, types, text_key("tokenizer.ggml.model", "llama")]
