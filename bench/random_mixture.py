"""Write a GGUF of a mixture of experts with random weights, whose routing is skewed and drifts as that of real ones.

    python -m bench.random_mixture --shape moe-6b OUT.gguf

A token's embedding has noise of its own, a few elements that are the same for all tokens and some that hold its topic,
which changes slowly from token to token. A router scores an expert by its popularity (through what all tokens share),
by how it likes the topic, and by the token's noise: the best of such scores are drawn by popularity, Zipf's, that
drifts. The head makes the token after t be t + 1, so that an answer runs through the topics, the same in every engine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from bench.gguf_header import begin_header, finish_header
from bench.random_model import ALIGNMENT, Tensor, UncachedWriter, random_data
from pipo.base.tensor_type import TensorType
from pipo.base.units import format_rate, format_size

Floats = npt.NDArray[np.float32]

ZIPF = 1.0  # popularity of the expert of rank r: r ** -ZIPF
TOPIC_NOISE, TOKEN_NOISE = 1.0, 0.8  # deviations of the scores; together those of a Gumbel variable, 1.28
TOKENS_PER_TOPIC = 256  # between two topics that have nothing in common
NUM_SHARED, NUM_TOPIC = 16, 64  # elements of an embedding
SHARED_VALUE, TOPIC_DEVIATION = 2.0, 1.5
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """As a Qwen 3 mixture has them."""

    num_layers: int
    hidden_size: int
    expert_size: int
    num_experts: int
    num_experts_per_tok: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int


SHAPES: Mapping[str, MixtureShape] = {
    "smoke-moe": MixtureShape(4, 256, 64, 16, 4, 4, 2, 64, 1024, 2048),
    "moe-6b": MixtureShape(48, 2048, 512, 64, 8, 32, 4, 128, 32000, 4096),
    "moe-2b": MixtureShape(16, 2048, 512, 64, 8, 32, 4, 128, 32000, 4096),
}
BLOCK, HEAD = TensorType.Q4_0, TensorType.Q8_0


def write_random_mixture(path: Path, shape: str = "moe-6b", *, seed: int = 0) -> int:
    """Write the file and return its size in bytes. The same arguments give the same bytes."""
    model = SHAPES[shape]
    tensors = list(_plan_tensors(model))
    _write_header(path, f"random {shape}", model, tensors)
    embeddings = Embeddings(model, seed)
    with UncachedWriter(path) as out:
        for tensor, chunks in random_data(tensors, seed):
            out.pad(ALIGNMENT)
            for chunk in _structured(tensor, model, embeddings, seed) or chunks:
                out.write(chunk)
        out.pad(ALIGNMENT)
    return path.stat().st_size


class Embeddings:
    """Rows of the table, made when asked for."""

    def __init__(self, model: MixtureShape, seed: int) -> None:
        self._model = model
        self._seed = seed
        anchors = model.vocab_size // TOKENS_PER_TOPIC + 2
        self._topics = np.random.default_rng((seed, 1)).standard_normal((anchors, NUM_TOPIC), dtype=np.float32)

    def rows(self, first: int, stop: int) -> Floats:
        """Of the tokens from `first` to `stop`, which is a multiple of ROWS_AT_ONCE away, or the last."""
        rng = np.random.default_rng((self._seed, 2, first))
        rows = rng.standard_normal((stop - first, self._model.hidden_size), dtype=np.float32)
        rows[:, :NUM_SHARED] = SHARED_VALUE
        rows[:, NUM_SHARED : NUM_SHARED + NUM_TOPIC] = TOPIC_DEVIATION * self._topic(np.arange(first, stop))
        return rows

    def _topic(self, tokens: npt.NDArray[np.int64]) -> Floats:
        """On the way from one anchor to the next, of deviation 1 throughout."""
        anchor, part = np.divmod(tokens / TOKENS_PER_TOPIC, 1)
        angle, at = (part * np.pi / 2)[:, None], anchor.astype(np.int64)
        mixed = np.cos(angle) * self._topics[at] + np.sin(angle) * self._topics[at + 1]
        return mixed.astype(np.float32)


def _structured(tensor: Tensor, model: MixtureShape, embeddings: Embeddings, seed: int) -> Iterator[memoryview] | None:
    """Bytes of a tensor that is more than noise."""
    if tensor.name == "token_embd.weight":
        return _quantised(embeddings, model, tensor.type, shift=0)
    if tensor.name == "output.weight":
        return _quantised(embeddings, model, tensor.type, shift=-1)
    if tensor.name.endswith("ffn_gate_inp.weight"):
        return iter([_router(model, seed, int(tensor.name.split(".")[1])).data.cast("B")])
    return None


def _quantised(embeddings: Embeddings, model: MixtureShape, type: TensorType, shift: int) -> Iterator[memoryview]:
    """Row t is the embedding of token t + shift; a head of them has the token before as its best."""
    size, last = model.vocab_size, np.zeros((0, model.hidden_size), np.float32)
    if shift:
        first_of_last = (size - 1) // ROWS_AT_ONCE * ROWS_AT_ONCE
        last = embeddings.rows(first_of_last, size)[-1:]
    for first in range(0, size, ROWS_AT_ONCE):
        rows = embeddings.rows(first, min(first + ROWS_AT_ONCE, size))
        if shift:
            rows, last = np.concatenate([last, rows[:-1]]), rows[-1:]
        scaled = rows * (2 / math.sqrt(model.hidden_size)) if shift else rows
        yield quantize(scaled, GGMLQuantizationType(type)).data.cast("B")


def _router(model: MixtureShape, seed: int, block: int) -> Floats:
    """(experts, hidden): popularity, taste and noise."""
    rng = np.random.default_rng((seed, 3, block))
    num, hidden = model.num_experts, model.hidden_size
    weights = rng.standard_normal((num, hidden), dtype=np.float32) * np.float32(TOKEN_NOISE / math.sqrt(hidden))
    popularity = -ZIPF * np.log1p(rng.permutation(num))
    weights[:, :NUM_SHARED] = (popularity / (NUM_SHARED * SHARED_VALUE))[:, None]
    taste = rng.standard_normal((num, NUM_TOPIC), dtype=np.float32)
    weights[:, NUM_SHARED : NUM_SHARED + NUM_TOPIC] = taste * (TOPIC_NOISE / TOPIC_DEVIATION / math.sqrt(NUM_TOPIC))
    return np.ascontiguousarray(weights, np.float32)


def _plan_tensors(model: MixtureShape) -> Iterator[Tensor]:
    hidden = model.hidden_size
    yield Tensor("output.weight", HEAD, (hidden, model.vocab_size), None)
    yield Tensor("output_norm.weight", TensorType.F32, (hidden,), None)
    yield Tensor("token_embd.weight", BLOCK, (hidden, model.vocab_size), None)
    for block in range(model.num_layers):
        yield from _plan_block(model, block)


def _plan_block(model: MixtureShape, block: int) -> Iterator[Tensor]:
    hidden, wide, num = model.hidden_size, model.expert_size, model.num_experts
    q_size, kv_size = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    damped = 1 / math.sqrt(2 * model.num_layers)

    def matrix(name: str, shape: tuple[int, ...], gain: float = 1.0) -> Tensor:
        return Tensor(f"blk.{block}.{name}.weight", BLOCK, shape, gain / math.sqrt(shape[0]))

    def vector(name: str, size: int) -> Tensor:
        return Tensor(f"blk.{block}.{name}.weight", TensorType.F32, (size,), None)

    yield matrix("attn_k", (hidden, kv_size))
    yield vector("attn_k_norm", model.head_dim)
    yield vector("attn_norm", hidden)
    yield matrix("attn_output", (q_size, hidden), damped)
    yield matrix("attn_q", (hidden, q_size))
    yield vector("attn_q_norm", model.head_dim)
    yield matrix("attn_v", (hidden, kv_size))
    yield matrix("ffn_down_exps", (wide, hidden, num), damped)
    yield matrix("ffn_gate_exps", (hidden, wide, num))
    yield Tensor(f"blk.{block}.ffn_gate_inp.weight", TensorType.F32, (hidden, num), None)
    yield vector("ffn_norm", hidden)
    yield matrix("ffn_up_exps", (hidden, wide, num))


def _write_header(path: Path, name: str, model: MixtureShape, tensors: list[Tensor]) -> None:
    writer = begin_header(path, "qwen3moe", name, model)
    writer.add_feed_forward_length(model.expert_size * model.num_experts_per_tok)
    writer.add_expert_feed_forward_length(model.expert_size)
    writer.add_expert_count(model.num_experts)
    writer.add_expert_used_count(model.num_experts_per_tok)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    finish_header(writer, model, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF of a mixture of experts with random weights.")
    parser.add_argument("--shape", choices=SHAPES, default="moe-6b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("path", type=Path, metavar="OUT.gguf")
    args = parser.parse_args()
    start_s = time.perf_counter()
    num_bytes = write_random_mixture(args.path, args.shape, seed=args.seed)
    took_s = time.perf_counter() - start_s
    print(f"{args.path}: {format_size(num_bytes)} in {took_s:.1f} s ({format_rate(num_bytes / took_s)})")


if __name__ == "__main__":
    main()
