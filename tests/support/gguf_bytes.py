"""GGUF headers written byte by byte, so that a test can get any one of them wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 6, 7, 8, 9, 10
F32, Q4_0, I8 = 0, 2, 24


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return string(name) + u32(value_type) + payload


def count_key(name: str, value: int) -> bytes:
    return key(name, UINT32, u32(value))


def text_key(name: str, value: str | bytes) -> bytes:
    return key(name, STRING, string(value))


def float_key(name: str, value: float) -> bytes:
    return key(name, FLOAT32, struct.pack("<f", value))


def array_key(name: str, element_type: int, items: Sequence[bytes], *, count: int | None = None) -> bytes:
    count = len(items) if count is None else count
    return key(name, ARRAY, u32(element_type) + u64(count) + b"".join(items))


def tensor(
    name: str | bytes, shape: Sequence[int], tensor_type: int = F32, offset: int = 0, *, num_dims: int | None = None
) -> bytes:
    num_dims = len(shape) if num_dims is None else num_dims
    return string(name) + u32(num_dims) + b"".join(map(u64, shape)) + u32(tensor_type) + u64(offset)


@dataclass(frozen=True, slots=True)
class GgufBytes:
    """A file in parts. `num_keys` and `num_tensors` may claim another number than there is."""

    keys: Sequence[bytes] = ()
    tensors: Sequence[bytes] = ()
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = u32(3)
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32

    def __bytes__(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + self.version + u64(num_tensors) + u64(num_keys) + b"".join((*self.keys, *self.tensors))
        return head + bytes(-len(head) % self.alignment) + self.data


def write(folder: Path, raw: bytes, name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def llama_keys(**changes: bytes | None) -> list[bytes]:
    """Keys of a small Llama. A change names a key by its last part and replaces it, or drops it when None."""
    keys: dict[str, bytes | None] = {
        "architecture": text_key("general.architecture", "llama"),
        "block_count": count_key("llama.block_count", 2),
        "embedding_length": count_key("llama.embedding_length", 64),
        "feed_forward_length": count_key("llama.feed_forward_length", 96),
        "head_count": count_key("llama.attention.head_count", 4),
        "head_count_kv": count_key("llama.attention.head_count_kv", 2),
        "rms_epsilon": float_key("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "context_length": count_key("llama.context_length", 256),
        "tokens": array_key("tokenizer.ggml.tokens", STRING, [string(t) for t in ("a", "b", "été", "")]),
        "scores": array_key("tokenizer.ggml.scores", FLOAT32, [struct.pack("<f", s) for s in (0, -1, -2, -3)]),
    }
    keys.update(changes)
    return [entry for entry in keys.values() if entry is not None]


def small_llama() -> GgufBytes:
    """A valid file: metadata of every kind that matters, two tensors."""
    tensors = [tensor("token_embd.weight", (64, 4), F32, 0), tensor("blk.0.attn_q.weight", (64, 64), Q4_0, 1024)]
    return GgufBytes(llama_keys(), tensors, bytes(1024 + 64 * 2 * 18))


def rich_llama() -> GgufBytes:
    """A llama with every value type, YaRN, an array per layer, an own alignment and three tensor types."""
    formats = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    scalars = [key(f"t.{number}", number, struct.pack("<" + fmt, 1)) for number, fmt in formats.items()]
    keys = [
        *llama_keys(head_count_kv=array_key("llama.attention.head_count_kv", UINT32, [u32(2), u32(2)])),
        text_key("llama.rope.scaling.type", "yarn"),
        float_key("llama.rope.scaling.factor", 4.0),
        array_key("t.flags", BOOL, [b"\0", b"\1"]),
        count_key("general.alignment", 64),
        *scalars,
    ]
    tensors = [tensor("a", (32, 2), Q4_0, 0), tensor("b", (2, 2, 2, 2), F32, 64), tensor("c", (3,), I8, 128)]
    return GgufBytes(keys, tensors, bytes(192), alignment=64)
