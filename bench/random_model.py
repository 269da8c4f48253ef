"""Write a GGUF of real shape with random weights, at the speed of the drive.

    python -m bench.random_model --shape llama-7b --type q4_0 OUT.gguf

Speed and memory of an engine depend on shapes and types, not on what the weights say, so no download is needed.
Norms are 1 and every matrix keeps the variance of its input, so logits stay finite and differ between tokens.
The weights repeat a template of 64 MiB per type, entered at a different block for every tensor: a drive that
compresses or deduplicates could notice.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import LlamaFileType

from bench.gguf_header import begin_header, finish_header
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, format_rate, format_size, round_up

ALIGNMENT = 32  # of tensor data; GGUF's default
TEMPLATE_BYTES = 64 * MIB
FLUSH_BYTES = 256 * MIB  # written between two drops of the page cache

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the Llama family."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    vocab_size: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Which type each tensor has. `more` replaces `block` for attn_v and ffn_down of every second or third block."""

    block: TensorType
    head: TensorType
    file_type: LlamaFileType
    more: TensorType | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape` in ggml order; `deviation` of its values, None for a vector of ones."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    deviation: float | None

    @property
    def num_bytes(self) -> int:
        return self.type.nbytes(self.shape)


SHAPES: Mapping[str, Shape] = {
    "smoke": Shape(4, 256, 768, 4, 2, 1024, 2048),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 32000, 2048),
    "llama-7b": Shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-13b": Shape(40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-70b": Shape(80, 8192, 28672, 64, 8, 32000, 4096),
}
# The head is Q6_K wherever llama-quantize makes it so: in every file below Q8_0.
MIXES: Mapping[str, Mix] = {
    "q4_0": Mix(TensorType.Q4_0, TensorType.Q6_K, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": Mix(TensorType.Q4_1, TensorType.Q6_K, LlamaFileType.MOSTLY_Q4_1),
    "q4_k": Mix(TensorType.Q4_K, TensorType.Q6_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q4_k_m": Mix(TensorType.Q4_K, TensorType.Q6_K, LlamaFileType.MOSTLY_Q4_K_M, more=TensorType.Q6_K),
    "q5_k": Mix(TensorType.Q5_K, TensorType.Q6_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q6_k": Mix(TensorType.Q6_K, TensorType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q8_0": Mix(TensorType.Q8_0, TensorType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": Mix(TensorType.F16, TensorType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Mix(TensorType.BF16, TensorType.BF16, LlamaFileType.MOSTLY_BF16),
}


def write_random_model(path: Path, shape: str = "llama-7b", type: str = "q4_0", *, seed: int = 0) -> int:
    """Write the file and return its size in bytes. The same arguments give the same bytes."""
    model, mix = SHAPES[shape], MIXES[type]
    tensors = list(plan_tensors(model, mix))
    _write_header(path, f"random {shape} {type}", model, mix, tensors)
    with UncachedWriter(path) as out:
        for _, chunks in random_data(tensors, seed):
            out.pad(ALIGNMENT)
            for chunk in chunks:
                out.write(chunk)
        out.pad(ALIGNMENT)
    return path.stat().st_size


def random_data(tensors: Sequence[Tensor], seed: int) -> Iterator[tuple[Tensor, Iterator[memoryview]]]:
    """Each tensor with its bytes, in chunks. The same arguments give the same bytes."""
    templates = _make_templates(tensors, seed)
    starts = np.random.default_rng(seed).random(len(tensors))
    for tensor, start in zip(tensors, starts, strict=True):
        yield tensor, _data(tensor, templates, float(start))


def plan_tensors(model: Shape, mix: Mix) -> Iterator[Tensor]:
    """In the order llama-quantize writes: the tensors of no block first, then block by block, each by name."""
    hidden, unit = model.hidden_size, 1 / math.sqrt(model.hidden_size)
    yield Tensor("output.weight", mix.head, (hidden, model.vocab_size), 2 * unit)
    yield Tensor("output_norm.weight", TensorType.F32, (hidden,), None)
    yield Tensor("token_embd.weight", mix.block, (hidden, model.vocab_size), 1.0)
    for block in range(model.num_layers):
        yield from _plan_block(model, mix, block)


def _plan_block(model: Shape, mix: Mix, block: int) -> Iterator[Tensor]:
    hidden, wide = model.hidden_size, model.intermediate_size
    kv_size = hidden // model.num_q_heads * model.num_kv_heads
    more = mix.more if mix.more is not None and _has_more_bits(block, model.num_layers) else mix.block
    # Both outputs of a block add to the stream: without this its variance grows with the depth.
    damped = 1 / math.sqrt(2 * model.num_layers)

    def matrix(name: str, size_in: int, size_out: int, type: TensorType, gain: float = 1.0) -> Tensor:
        return Tensor(f"blk.{block}.{name}.weight", type, (size_in, size_out), gain / math.sqrt(size_in))

    def norm(name: str) -> Tensor:
        return Tensor(f"blk.{block}.{name}.weight", TensorType.F32, (hidden,), None)

    yield matrix("attn_k", hidden, kv_size, mix.block)
    yield norm("attn_norm")
    yield matrix("attn_output", hidden, hidden, mix.block, damped)
    yield matrix("attn_q", hidden, hidden, mix.block)
    yield matrix("attn_v", hidden, kv_size, more)
    yield matrix("ffn_down", wide, hidden, more, damped)
    yield matrix("ffn_gate", hidden, wide, mix.block)
    yield norm("ffn_norm")
    yield matrix("ffn_up", hidden, wide, mix.block)


def _has_more_bits(block: int, num_layers: int) -> bool:
    """llama-quantize's choice for the `_M` mixes: the first and last eighth, and every third between."""
    eighth = num_layers // 8
    return block < eighth or block >= 7 * num_layers // 8 or (block - eighth) % 3 == 2


def _write_header(path: Path, name: str, model: Shape, mix: Mix, tensors: Sequence[Tensor]) -> None:
    writer = begin_header(path, "llama", name, model)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(mix.file_type)
    writer.add_rope_dimension_count(model.hidden_size // model.num_q_heads)
    finish_header(writer, model, tensors)


class UncachedWriter:
    """Appends to a file and keeps at most FLUSH_BYTES of it in the page cache."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._unflushed_bytes = 0

    def __enter__(self) -> UncachedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def pad(self, multiple: int) -> None:
        end = self._file.tell()
        self.write(memoryview(bytes(round_up(end, multiple) - end)))

    def write(self, data: memoryview) -> None:
        while data.nbytes:
            written = self._file.write(data[:FLUSH_BYTES])
            data = data[written:]
            self._unflushed_bytes += written
            if self._unflushed_bytes >= FLUSH_BYTES:
                self._flush()

    def _flush(self) -> None:
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unflushed_bytes = 0


_Templates = Mapping[tuple[TensorType, float], Bytes]


def _make_templates(tensors: Sequence[Tensor], seed: int) -> _Templates:
    """For each type and deviation, whole blocks up to TEMPLATE_BYTES. Shape of each: (blocks, bytes of one)."""
    wanted: dict[tuple[TensorType, float], int] = {}
    for tensor in tensors:
        if tensor.deviation is not None:
            key = (tensor.type, tensor.deviation)
            wanted[key] = max(wanted.get(key, 0), min(tensor.num_bytes, TEMPLATE_BYTES))
    rng = np.random.default_rng(seed)
    return {
        (type, deviation): _RANDOM_BLOCKS[type](rng, num_bytes // type.block_bytes, deviation)
        for (type, deviation), num_bytes in wanted.items()
    }


def _data(tensor: Tensor, templates: _Templates, start: float) -> Iterator[memoryview]:
    """The tensor's bytes: its template from the block at `start` (a fraction of it), repeated as needed."""
    if tensor.deviation is None:
        yield np.ones(tensor.shape, dtype="<f4").data.cast("B")
        return
    template = templates[tensor.type, tensor.deviation]
    whole = template.reshape(-1).data
    offset = int(start * len(template)) * template.shape[1]
    left = tensor.num_bytes
    while left:
        chunk = whole[offset : offset + left]
        yield chunk
        left -= chunk.nbytes
        offset = 0


# A uniform integer of n values has the deviation sqrt((n² - 1) / 12).
def _uniform_deviation(num_values: int) -> float:
    return math.sqrt((num_values**2 - 1) / 12)


def _random_bytes(rng: np.random.Generator, rows: int, columns: int) -> Bytes:
    return np.frombuffer(rng.bytes(rows * columns), dtype=np.uint8).reshape(rows, columns).copy()


def _f16_bytes(values: npt.NDArray[np.floating]) -> Bytes:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _signs(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """±1 for each block: the integers of most types are not symmetric, so that one sign would shift the mean."""
    return np.where(rng.random(count) < 0.5, np.float32(-1), np.float32(1))


def _q4_0(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    """d · (q - 8)"""
    blocks = _random_bytes(rng, num_blocks, 18)
    blocks[:, :2] = _f16_bytes(_signs(rng, num_blocks) * (deviation / _uniform_deviation(16)))
    return blocks


def _q4_1(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    """d · q + m, with m = -7.5 d"""
    blocks = _random_bytes(rng, num_blocks, 20)
    scales = _signs(rng, num_blocks) * (deviation / _uniform_deviation(16))
    blocks[:, :2], blocks[:, 2:4] = _f16_bytes(scales), _f16_bytes(-7.5 * scales)
    return blocks


def _q8_0(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    """d · q; -128 never occurs in a real file, and kernels may rely on it"""
    blocks = _random_bytes(rng, num_blocks, 34)
    blocks[:, 2:][blocks[:, 2:] == 0x80] = 0
    blocks[:, :2] = _f16_bytes(_signs(rng, num_blocks) * (deviation / _uniform_deviation(255)))
    return blocks


def _q4_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    blocks = _random_bytes(rng, num_blocks, 144)
    blocks[:, :16] = _k_header(rng, num_blocks, deviation, num_values=16)
    return blocks


def _q5_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    blocks = _random_bytes(rng, num_blocks, 176)
    blocks[:, :16] = _k_header(rng, num_blocks, deviation, num_values=32)
    return blocks


def _k_header(rng: np.random.Generator, num_blocks: int, deviation: float, *, num_values: int) -> Bytes:
    """d · s · q - dmin · m, with m = s and dmin = d · (mean of q): zero mean. Bytes: d, dmin, eight 6-bit s and m."""
    scales = rng.integers(32, 64, size=(num_blocks, 8), dtype=np.uint8)
    first, last = scales[:, :4], scales[:, 4:]
    packed_first = first | (last >> 4) << 6
    packed_last = last & 15 | (last & 15) << 4
    unit = deviation / _uniform_deviation(num_values) / math.sqrt(np.mean(np.square(np.arange(32, 64))))
    d = np.full(num_blocks, unit)
    mins = d.astype("<f2") * ((num_values - 1) / 2)
    return np.concatenate([_f16_bytes(d), _f16_bytes(mins), packed_first, packed_first, packed_last], axis=1)


def _q6_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    """d · s · (q - 32), s an int8 for every 16 values: bytes 192 to 207; d last"""
    blocks = _random_bytes(rng, num_blocks, 210)
    magnitudes = rng.integers(32, 64, size=(num_blocks, 16), dtype=np.int8)
    blocks[:, 192:208] = np.where(rng.random((num_blocks, 16)) < 0.5, -magnitudes, magnitudes).view(np.uint8)
    unit = deviation / _uniform_deviation(64) / math.sqrt(np.mean(np.square(np.arange(32, 64))))
    blocks[:, 208:] = _f16_bytes(np.full(num_blocks, unit))
    return blocks


def _f16(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    return _f16_bytes(rng.standard_normal(num_blocks, dtype=np.float32) * np.float32(deviation))


def _bf16(rng: np.random.Generator, num_blocks: int, deviation: float) -> Bytes:
    values = rng.standard_normal(num_blocks, dtype=np.float32) * np.float32(deviation)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1, 2)


_RANDOM_BLOCKS: Mapping[TensorType, Callable[[np.random.Generator, int, float], Bytes]] = {
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF of real shape with random weights.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--type", choices=MIXES, default="q4_0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("path", type=Path, metavar="OUT.gguf")
    args = parser.parse_args()
    start_s = time.perf_counter()
    num_bytes = write_random_model(args.path, args.shape, args.type, seed=args.seed)
    took_s = time.perf_counter() - start_s
    print(f"{args.path}: {format_size(num_bytes)} in {took_s:.1f} s ({format_rate(num_bytes / took_s)})")


if __name__ == "__main__":
    main()
