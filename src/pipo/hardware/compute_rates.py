"""How fast a backend computes, measured with the ops that stages are made of, laid as they lay them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo.base.machine import ProductRate
from pipo.base.manifest import Rope
from pipo.base.tensor_type import TensorType
from pipo.base.units import KIB, PAGE_BYTES, round_down, round_up
from pipo.compute.graphs import Builder, Tensor, WeightType
from pipo.hardware.meter import Lay, Meter

# ggml's repacked kernels take four rows at once and the rest one by one, so few rows want more points
PRODUCT_TOKENS = (1, 2, 3, 4, 7, 8, 15, 16, 32, 64, 128, 512)
# its attention on the CPU works in tiles from 64 query rows on
ATTENTION_TOKENS = (1, 4, 16, 32, 64, 128)
_RUN_S = 0.02  # of many rows: fewer matrices a run where all of them would take longer
_LONGEST_RUN_S = 0.25  # rates are straight lines long before
_F32 = TensorType.F32
_EPSILON = 1e-5
_OPS_PER_STAGE = 9.5  # of an attention stage 12, of an MLP 7, views not counted


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


TINY = BlockShape(64, 64, 2, 256)  # whose ops cost what ops cost at least


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds: of the ops of a stage however small they are, and of starting a graph."""

    stage_s: float
    graph_start_s: float

    @property
    def op_s(self) -> float:
        return self.stage_s / _OPS_PER_STAGE


def measure_overheads(meter: Meter, duration_s: float, num_stages: int = 16) -> Overheads:
    """From stages that hold next to nothing: many in one graph, and two."""
    seconds = []
    for count in (num_stages, 2):
        with meter.built(_tiny_stages(count), 64 * count) as graph:
            inputs = _Inputs(1, TINY.num_positions)
            places = _side_by_side(meter, graph.leaf_names, 64 * KIB)
            seconds.append(meter.graph_s(graph, [places | inputs.of(graph.leaf_names)], duration_s / 2))
    stage_s = max(seconds[0] - seconds[1], 1e-9) / (num_stages - 2)
    return Overheads(stage_s, max(seconds[1] - 2 * stage_s, 0.0))


def measure_products(
    meter: Meter, layout: WeightType, op_s: float, duration_s: float, shape: BlockShape = BlockShape()
) -> ProductRate:
    """Cost: about `duration_s`, more where a backend is slow."""
    points: list[tuple[int, float]] = []
    for num_tokens in PRODUCT_TOKENS:
        expected_s = points[-1][1] * num_tokens / points[-1][0] if points else 0.0
        if expected_s * shape.hidden_size**2 > _LONGEST_RUN_S:
            break
        each_s = duration_s / len(PRODUCT_TOKENS)
        points.append((num_tokens, _product_s(meter, layout, shape, num_tokens, expected_s, op_s, each_s)))
    return ProductRate(tuple(points))


def _product_s(
    meter: Meter, layout: WeightType, shape: BlockShape, num_tokens: int, expected_s: float, op_s: float, each_s: float
) -> float:
    """Seconds per element. Every run takes the next matrices of the place."""
    size = round_down(shape.hidden_size, layout.type.block_elems)
    num_bytes = round_up(size * layout.type.row_bytes(size), PAGE_BYTES)
    num_all = max(meter.weights.num_bytes // num_bytes, 1)
    num_used = min(num_all, max(int(_RUN_S / (expected_s * size * size)), 1)) if expected_s else num_all

    def lay(ops: Builder) -> None:
        x = ops.leaf("x", _F32, size, num_tokens)
        for i in range(num_used):
            ops.expand(ops.output(f"y{i}", ops.mul_mat(ops.weight(f"w{i}", layout, size, size), x)))

    y_address = meter.activations.address + shape.activation_bytes // 2
    fixed = {"x": meter.activations.address} | {f"y{i}": y_address for i in range(num_used)}
    starts = range(0, num_all, num_used)
    weights = [[(start + i) % num_all * num_bytes + meter.weights.address for i in range(num_used)] for start in starts]
    places = [fixed | {f"w{i}": address for i, address in enumerate(each)} for each in weights]
    with meter.built(lay, 4 * num_used + 8) as graph:
        return max(meter.graph_s(graph, places, each_s) / num_used - op_s, 1e-9) / (size * size)


def measure_attention(
    meter: Meter, type_: TensorType, duration_s: float, shape: BlockShape = BlockShape()
) -> ProductRate:
    """By query rows: seconds per element of K or V that is seen."""
    each_s = duration_s / len(ATTENTION_TOKENS)
    return ProductRate(tuple((n, _attention_s(meter, type_, n, each_s, shape)) for n in ATTENTION_TOKENS))


def _attention_s(meter: Meter, type_: TensorType, num_tokens: int, duration_s: float, shape: BlockShape) -> float:
    num_bytes = round_up(shape.num_positions * type_.row_bytes(shape.hidden_size), PAGE_BYTES)
    inputs = _Inputs(num_tokens, shape.num_positions)

    def lay(ops: Builder) -> None:
        q = ops.leaf("q", _F32, shape.head_dim, shape.num_heads, num_tokens)
        k, v = (ops.leaf(name, type_, shape.hidden_size, shape.num_positions) for name in "kv")
        ops.expand(ops.output("y", _attend(ops, shape, q, k, v)))

    y_address = meter.activations.address + shape.activation_bytes // 2
    fixed = {"q": meter.activations.address, "y": y_address, "mask": inputs.mask.ctypes.data}
    starts = range(
        meter.weights.address, meter.weights.address + meter.weights.num_bytes - 2 * num_bytes, 2 * num_bytes
    )
    with meter.built(lay) as graph:
        places = [fixed | {"k": start, "v": start + num_bytes} for start in starts]
        return meter.graph_s(graph, places, duration_s) / (2 * shape.hidden_size * shape.num_positions)


def measure_activations(
    meter: Meter, duration_s: float, shape: BlockShape = BlockShape(), num_tokens: int = 64
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
        named = {name: name.rpartition(".")[2] for name in leaf_names}
        return {name: self._arrays[short].ctypes.data for name, short in named.items() if short in self._arrays}


def _side_by_side(meter: Meter, leaf_names: Iterable[str], step: int) -> dict[str, int]:
    """Each leaf on its own `step` bytes of the weights' place, from the start again where they do not all fit."""
    num_steps = max(meter.weights.num_bytes // step, 1)
    return {name: meter.weights.address + i % num_steps * step for i, name in enumerate(leaf_names)}


def _tiny_stages(num_stages: int) -> Lay:
    def lay(ops: Builder) -> None:
        for i in range(num_stages):
            ops.prefix = f"{i}."
            _lay_tiny_attention(ops) if i % 2 else _lay_tiny_mlp(ops)

    return lay


def _lay_tiny_attention(ops: Builder) -> None:
    size = TINY.hidden_size
    hidden = ops.leaf("hidden", _F32, size, 1)
    x = _norm(ops, hidden, "norm")
    q, k, v = (ops.mul_mat(ops.leaf(f"w{name}", _F32, size, size), x) for name in "qkv")
    q, k, v = _rotate_and_store(ops, TINY, q, k, v)
    mixed = ops.reshape(_attend(ops, TINY, q, k, v), size, 1)
    ops.expand(ops.add_inplace(hidden, ops.mul_mat(ops.leaf("wo", _F32, size, size), mixed)))


def _lay_tiny_mlp(ops: Builder) -> None:
    size = TINY.hidden_size
    hidden = ops.leaf("hidden", _F32, size, 1)
    x = _norm(ops, hidden, "norm")
    gate, up = (ops.mul_mat(ops.leaf(f"w{name}", _F32, size, size), x) for name in ("gate", "up"))
    ops.expand(ops.add_inplace(hidden, ops.mul_mat(ops.leaf("wdown", _F32, size, size), ops.swiglu(gate, up))))


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
