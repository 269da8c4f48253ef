"""How fast a backend computes, measured with the ops that stages are made of, laid as they lay them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo.base.machine import ProductRate
from pipo.base.manifest import Rope
from pipo.base.tensor_type import TensorType
from pipo.base.units import KIB, PAGE_BYTES, round_down, round_up
from pipo.compute.graph import Graph
from pipo.compute.graphs import Builder, WeightType
from pipo.compute.views import Tensor
from pipo.hardware.meter import AnyMeter

# ggml's repacked kernels take four rows at once and the rest one by one, so few rows want more points
PRODUCT_TOKENS = (1, 2, 3, 4, 7, 8, 15, 16, 32, 64, 128, 512)
# its attention on the CPU works in tiles from 64 query rows on
ATTENTION_TOKENS = (1, 4, 16, 32, 64, 128)
_RUN_S = 0.01  # of many rows: fewer matrices a run where all of them would take longer
_LONGEST_RUN_S = 0.06  # of one matrix: at that many rows the rate is a straight line
_F32 = TensorType.F32
_EPSILON = 1e-5
_START_TOKENS = (1, 8, 32, 128)
_NUM_SMALL = 48  # small matrices in one graph


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Sizes of the block that is measured, by default a 7B's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_heads: int = 32
    num_positions: int = 512

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def activation_bytes(self) -> int:
        """Two matrices of hidden rows, the most any measurement binds at once."""
        return 2 * round_up(max(PRODUCT_TOKENS) * self.hidden_size * 4, PAGE_BYTES)


SMALL = BlockShape(512, 1536, 8, 256)  # of a 135M model, about


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds: of the ops of a stage however small they are, its products not counted, and of starting a graph."""

    stage_s: float
    graph_start_s: float


@dataclass(frozen=True, slots=True)
class MatrixRate:
    """Seconds per element of a product, and of a product besides its elements, both by rows."""

    elements: ProductRate
    start: ProductRate | None

    def best_of(self, other: MatrixRate) -> MatrixRate:
        start = self.start.best_of(other.start) if self.start is not None and other.start is not None else None
        return MatrixRate(self.elements.best_of(other.elements), start)


def measure_overheads(meter: AnyMeter, type_: TensorType, duration_s: float, num_stages: int = 16) -> Overheads:
    """From stages of a small model, which find their caches as cold as their weights leave them, less their products.

    The same ops over hot caches take two thirds of it.
    """

    inputs = _Inputs(1, SMALL.num_positions)

    def seconds(lay: Callable[[Builder, TensorType, int], None], count: int) -> float:
        with meter.built(lambda ops: lay(ops, type_, count), 64 * count) as graph:
            return meter.graph_s(graph, _small_places(meter, graph.leaf_names, type_, inputs), duration_s / 3)

    whole_s, products_s = seconds(_lay_stages, num_stages), seconds(_lay_products, num_stages)
    return Overheads(max(whole_s - products_s, 0.0) / num_stages, _graph_start_s(meter, duration_s / 3))


def _graph_start_s(meter: AnyMeter, duration_s: float) -> float:
    """Of a graph that has next to nothing to do, bound anew for every run."""
    with meter.built(lambda ops: ops.expand(ops.add_inplace(*(ops.leaf(name, _F32, 32) for name in "ab")))) as graph:
        starts = (meter.activations.address, meter.activations.address + 64 * KIB)
        return meter.graph_s(graph, [{"a": start, "b": start + KIB} for start in starts], duration_s)


def measure_products(
    meter: AnyMeter, layout: WeightType, duration_s: float, shape: BlockShape = BlockShape()
) -> MatrixRate:
    """Large matrices, and small ones for what does not depend on size. Cost: about `duration_s`, more where a backend
    is slow.
    """
    each_s = duration_s / (len(PRODUCT_TOKENS) + len(_START_TOKENS))
    size, small = (_whole_blocks(n, layout.type) for n in (shape.hidden_size, shape.hidden_size // 8))
    seconds: dict[int, float] = {}
    row_s = 0.0
    for num_tokens in PRODUCT_TOKENS:
        if num_tokens * row_s > _LONGEST_RUN_S:
            break
        num_used = max(int(_RUN_S / (num_tokens * row_s)), 1) if row_s else _NUM_SMALL
        seconds[num_tokens] = _product_s(meter, layout, size, num_tokens, num_used, each_s)
        row_s = seconds[num_tokens] / num_tokens
    start = None
    if small < size:
        pairs = [
            (n, _product_s(meter, layout, small, n, _NUM_SMALL, each_s), seconds[n])
            for n in _START_TOKENS
            if n in seconds
        ]
        share = small**2 / size**2
        start = ProductRate(tuple((n, max((few_s - many_s * share) / (1 - share), 1e-9)) for n, few_s, many_s in pairs))
    points = ((n, s - (start.seconds(1, n) if start else 0.0)) for n, s in seconds.items())
    return MatrixRate(ProductRate(tuple((n, max(s, 1e-9) / size**2) for n, s in points)), start)


def _whole_blocks(num_elements: int, type_: TensorType) -> int:
    return max(round_down(num_elements, type_.block_elems), type_.block_elems)


def _product_s(
    meter: AnyMeter, layout: WeightType, size: int, num_tokens: int, most_used: int, duration_s: float
) -> float:
    """Seconds of one square matrix, of many in a graph."""
    with products(meter, layout, size, num_tokens, most_used) as (graph, places):
        num_used = sum(name.startswith("w") for name in places[0])
        return meter.graph_s(graph, places, duration_s) / num_used


@contextmanager
def products(
    meter: AnyMeter, layout: WeightType, size: int, num_tokens: int, most_used: int = _NUM_SMALL
) -> Iterator[tuple[Graph, list[dict[str, int]]]]:
    """A graph of square matrices times rows, and where its leaves lie: every run takes the next ones of the place."""
    num_bytes = round_up(size * layout.type.row_bytes(size), PAGE_BYTES)
    num_all = max(meter.weights.num_bytes // num_bytes, 1)
    num_used = min(num_all, most_used)

    def lay(ops: Builder) -> None:
        x = ops.leaf("x", _F32, size, num_tokens)
        for i in range(num_used):
            ops.expand(ops.output(f"y{i}", ops.mul_mat(ops.weight(f"w{i}", layout, size, size), x)))

    y_address = meter.activations.address + meter.activations.num_bytes // 2
    fixed = {"x": meter.activations.address} | {f"y{i}": y_address for i in range(num_used)}
    starts = range(0, num_all, num_used)
    weights = [[(start + i) % num_all * num_bytes + meter.weights.address for i in range(num_used)] for start in starts]
    with meter.built(lay, 4 * num_used + 8) as graph:
        yield graph, [fixed | {f"w{i}": address for i, address in enumerate(each)} for each in weights]


def measure_attention(
    meter: AnyMeter, type_: TensorType, duration_s: float, shape: BlockShape = BlockShape()
) -> ProductRate:
    """By query rows: seconds per element of K or V that is seen."""
    each_s = duration_s / len(ATTENTION_TOKENS)
    return ProductRate(tuple((n, _attention_s(meter, type_, n, each_s, shape)) for n in ATTENTION_TOKENS))


def _attention_s(meter: AnyMeter, type_: TensorType, num_tokens: int, duration_s: float, shape: BlockShape) -> float:
    num_bytes = round_up(shape.num_positions * type_.row_bytes(shape.hidden_size), PAGE_BYTES)
    inputs = _Inputs(num_tokens, shape.num_positions)

    def lay(ops: Builder) -> None:
        q = ops.leaf("q", _F32, shape.head_dim, shape.num_heads, num_tokens)
        k, v = (ops.leaf(name, type_, shape.hidden_size, shape.num_positions) for name in "kv")
        ops.expand(ops.output("y", _attend(ops, shape, q, k, v)))

    y_address = meter.activations.address + meter.activations.num_bytes // 2
    fixed = {"q": meter.activations.address, "y": y_address, "mask": inputs.mask.ctypes.data}
    starts = range(
        meter.weights.address, meter.weights.address + meter.weights.num_bytes - 2 * num_bytes, 2 * num_bytes
    )
    with meter.built(lay) as graph:
        places = [fixed | {"k": start, "v": start + num_bytes} for start in starts]
        return meter.graph_s(graph, places, duration_s) / (2 * shape.hidden_size * shape.num_positions)


def measure_activations(
    meter: AnyMeter, duration_s: float, shape: BlockShape = BlockShape(), num_tokens: int = 64
) -> float:
    """Seconds per element that goes into or comes out of a product, of all that a block computes between those."""

    def lay(ops: Builder) -> None:
        hidden, q, k, v = (ops.leaf(name, _F32, shape.hidden_size, num_tokens) for name in ("h", "q", "k", "v"))
        gate, up = (ops.leaf(name, _F32, shape.intermediate_size, num_tokens) for name in ("gate", "up"))
        ops.expand(_norm(ops, hidden, "attn_norm"), *_rotate_and_store(ops, shape, q, k, v), ops.add_inplace(hidden, v))
        ops.expand(_norm(ops, hidden, "mlp_norm"), ops.swiglu(gate, up), ops.add_inplace(hidden, v))

    # an attention has four products between hidden rows, an MLP three between those and wide ones
    num_elements = num_tokens * (11 * shape.hidden_size + 3 * shape.intermediate_size)
    inputs = _Inputs(num_tokens, shape.num_positions)
    with meter.built(lay) as graph:
        step = round_up(shape.intermediate_size * max(num_tokens, shape.num_positions) * 4, PAGE_BYTES)
        places = _side_by_side(meter, graph.leaf_names, step)
        return meter.graph_s(graph, [places | inputs.of(graph.leaf_names)], duration_s) / num_elements


class _Inputs:
    """What a pass prepares: every position in range, every cached row seen."""

    def __init__(self, num_tokens: int, num_positions: int) -> None:
        self.mask: npt.NDArray[np.float16] = np.zeros((num_tokens, num_positions), np.float16)
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "mask": self.mask,
            "positions": np.arange(num_tokens, dtype=np.int32),
            "kv_rows": np.arange(num_tokens, dtype=np.int64),
        }

    def of(self, leaf_names: Iterable[str]) -> dict[str, int]:
        """Addresses, for the leaves among these that are inputs; prefixes do not matter."""
        named = {name: _short(name) for name in leaf_names}
        return {name: self._arrays[short].ctypes.data for name, short in named.items() if short in self._arrays}


def _side_by_side(meter: AnyMeter, leaf_names: Iterable[str], step: int) -> dict[str, int]:
    """Each leaf on its own `step` bytes of the weights' place, from the start again where they do not all fit."""
    num_steps = max(meter.weights.num_bytes // step, 1)
    return {name: meter.weights.address + i % num_steps * step for i, name in enumerate(leaf_names)}


def _small_places(
    meter: AnyMeter, leaf_names: Iterable[str], type_: TensorType, inputs: _Inputs
) -> list[dict[str, int]]:
    """Weights elsewhere in every run, the rest where it was."""
    names = list(leaf_names)
    weights = [name for name in names if _short(name).startswith("w_")]
    room = round_up(type_.row_bytes(_whole_blocks(SMALL.hidden_size, type_)) * SMALL.intermediate_size, PAGE_BYTES)
    num_turns = max(meter.weights.num_bytes // (room * len(weights)), 1)
    num_rooms = max(meter.weights.num_bytes // room, 1)
    num_small = meter.activations.num_bytes // (256 * KIB)  # of which none is larger: a cache of 256 rows
    fixed = {name: meter.activations.address + i % num_small * 256 * KIB for i, name in enumerate(names)}
    fixed |= inputs.of(names)
    return [
        fixed
        | {name: meter.weights.address + (turn * len(weights) + i) % num_rooms * room for i, name in enumerate(weights)}
        for turn in range(num_turns)
    ]


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _lay_stages(ops: Builder, type_: TensorType, num_stages: int) -> None:
    """Attention and MLP in turn, one token."""
    size = SMALL.hidden_size
    for i in range(num_stages):
        ops.prefix = f"{i}."
        hidden = ops.leaf("hidden", _F32, size, 1)
        x = _norm(ops, hidden, "norm")
        if i % 2:
            q, k, v = (_linear(ops, type_, name, x, size) for name in "qkv")
            q, k, v = _rotate_and_store(ops, SMALL, q, k, v)
            y, role = ops.reshape(_attend(ops, SMALL, q, k, v), size, 1), "o"
        else:
            gate, up = (_linear(ops, type_, name, x, SMALL.intermediate_size) for name in ("gate", "up"))
            y, role = ops.swiglu(gate, up), "down"
        ops.expand(ops.add_inplace(hidden, _linear(ops, type_, role, y, size)))


def _lay_products(ops: Builder, type_: TensorType, num_stages: int) -> None:
    """The products of those stages alone."""
    size, wide = SMALL.hidden_size, SMALL.intermediate_size
    for i in range(num_stages):
        ops.prefix = f"{i}."
        x, x_wide = ops.leaf("hidden", _F32, size, 1), ops.leaf("wide", _F32, wide, 1)
        matrices = [("q", x, size), ("k", x, size), ("v", x, size), ("o", x, size)]
        if i % 2 == 0:
            matrices = [("gate", x, wide), ("up", x, wide), ("down", x_wide, size)]
        for role, source, num_out in matrices:
            ops.expand(ops.output(f"y_{role}", _linear(ops, type_, role, source, num_out)))


def _linear(ops: Builder, type_: TensorType, role: str, x: Tensor, num_out: int) -> Tensor:
    return ops.mul_mat(ops.weight(f"w_{role}", WeightType(type_), x.shape[0], num_out), x)


def _norm(ops: Builder, x: Tensor, name: str) -> Tensor:
    return ops.mul(ops.rms_norm(x, _EPSILON), ops.leaf(name, _F32, x.shape[0]))


def _rotate_and_store(ops: Builder, shape: BlockShape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries (head_dim, heads, tokens), and the caches that this pass's keys and values were written to."""
    num_tokens, rope = q.shape[1], Rope(shape.head_dim, 10000.0)
    positions = ops.leaf("positions", TensorType.I32, num_tokens)
    rows = ops.leaf("kv_rows", TensorType.I64, num_tokens)
    q, k = (
        ops.rope(ops.reshape(x, shape.head_dim, shape.num_heads, num_tokens), positions, rope, None) for x in (q, k)
    )
    caches = (ops.leaf(name, TensorType.F16, shape.hidden_size, shape.num_positions) for name in ("k_cache", "v_cache"))
    new = (ops.reshape(k, shape.hidden_size, num_tokens), v)
    return q, *(ops.set_rows(cache, x, rows) for cache, x in zip(caches, new, strict=True))


def _attend(ops: Builder, shape: BlockShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every position. q (head_dim, heads, tokens); k, v (hidden_size, positions)."""
    mask = ops.leaf("mask", TensorType.F16, shape.num_positions, q.shape[2])
    keys, values = (ops.heads_view(x, shape.head_dim, shape.num_heads, shape.num_positions) for x in (k, v))
    return ops.flash_attention(ops.permute(q, 0, 2, 1), keys, values, mask, shape.head_dim**-0.5)
