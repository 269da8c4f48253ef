"""Graphs that are built once and re-pointed before every run.

A `Builder` lays ggml ops over named leaves. `Builder.build` places the intermediate tensors in the shared
`Workspace`, of the CPU or of a device, and returns a `Graph`, whose leaves are then bound to memory by name: a weight
to the slot it arrived in, the KV cache to its layer. Shapes and types are checked here in Python, because ggml answers
a mistake with `abort()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from dataclasses import dataclass
from math import pi, sqrt
from typing import NoReturn

from pipo.base.errors import ComputeError
from pipo.base.manifest import Rope, RopeLayout, RopeScaling
from pipo.base.tensor_type import TensorType
from pipo.compute.ggml import InitParams, Library
from pipo.compute.graph import Graph, Leaf, Workspace
from pipo.compute.repack import RepackBuffer
from pipo.compute.views import Tensor, Views, is_contiguous

MAX_NODES = 128  # of a graph, leaves counted, unless its builder is told more
_UNBOUND = 64  # any non-null address: tells the allocator that this tensor's memory is ours
_ROPE_MODE = {RopeLayout.NORMAL: 0, RopeLayout.NEOX: 2}
_PREC_F32 = 10
# what ggml's set_rows can write and its attention read
_CACHEABLE = {
    TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0, TensorType.Q4_1,
    TensorType.Q5_0, TensorType.Q5_1, TensorType.IQ4_NL,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightType:
    """How a weight's bytes are laid out in memory: a ggml type, plain or repacked for this CPU's kernels."""

    type: TensorType
    is_repacked: bool = False


class Builder(Views):
    """Collects ops for one graph. Threads: one. Raises ComputeError where ggml would abort."""

    def __init__(self, lib: Library, repack: RepackBuffer | None = None, max_nodes: int = MAX_NODES) -> None:
        self._lib = lib
        self._repack = repack
        size = max_nodes * lib.tensor_overhead() + lib.graph_overhead_custom(max_nodes, False)
        self._context = lib.init(InitParams(size, None, True))
        if not self._context:
            raise ComputeError("ggml could not allocate a graph context")
        self._graph = lib.new_graph_custom(self._context, max_nodes, False)
        self._max_nodes = max_nodes
        self._num_tensors = 0
        self.prefix = ""  # of the names of leaves to come: stages that share a graph each have their own
        self._leaves: dict[str, Tensor] = {}

    # leaves: memory that the caller binds

    def leaf(self, name: str, type_: TensorType, *shape: int, strides: Sequence[int] | None = None) -> Tensor:
        """A tensor whose memory is bound by `Graph.bind`. `strides`: bytes per step of each dimension (`nb`)."""
        tensor = self._new(type_, shape)
        struct = tensor.struct
        struct.data = _UNBOUND
        for i, stride in enumerate(strides or ()):
            struct.nb[i] = stride
        return self._named(name, tensor)

    def weight(self, name: str, layout: WeightType, *shape: int) -> Tensor:
        tensor = self.leaf(name, layout.type, *shape)
        if layout.is_repacked:
            if self._repack is None:
                self._refuse(f"weight {name} is repacked, but this backend has no repacked kernels")
            self._repack.adopt(tensor.address)
        return tensor

    def output(self, name: str, tensor: Tensor) -> Tensor:
        """Make the result of an op land in memory bound by `Graph.bind` instead of the workspace."""
        struct = tensor.struct
        if struct.view_src:
            self._refuse(f"output {name} is a view")
        struct.data = _UNBOUND
        return self._named(name, tensor)

    def _named(self, name: str, tensor: Tensor) -> Tensor:
        name = self.prefix + name
        if name in self._leaves:
            self._refuse(f"two leaves are named {name}")
        self._leaves[name] = tensor
        return tensor

    # ops, in the words of ggml.h

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast("add", a, b)
        return self._op("add", a.type, a.shape, a, b)

    def add_inplace(self, a: Tensor, b: Tensor) -> Tensor:
        """`a += b`; the result is a view of `a`."""
        self._check_broadcast("add_inplace", a, b)
        return self._op("add_inplace", a.type, a.shape, a, b)

    def add_to_tokens(self, a: Tensor, b: Tensor, first: int) -> Tensor:
        """Add `b` (n, k) to tokens first, first + 1, … of `a` (n, any), in place; the result is a view of `a`."""
        self._check_rows("add_to_tokens", a, b)
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[0] and 0 <= first <= a.shape[1] - b.shape[1]
        if not fits or not is_contiguous(a) or not is_contiguous(b):
            self._refuse(f"add_to_tokens of {b.shape} to {a.shape} from {first} on")
        row_bytes = a.type.row_bytes(a.shape[0])
        all_bytes = row_bytes * a.shape[1]
        return self._op("acc_inplace", a.type, a.shape, a, b, row_bytes, all_bytes, all_bytes, first * row_bytes)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast("mul", a, b)
        return self._op("mul", a.type, a.shape, a, b)

    def rms_norm(self, a: Tensor, epsilon: float) -> Tensor:
        return self._norm("rms_norm", a, epsilon)

    def norm(self, a: Tensor, epsilon: float) -> Tensor:
        """To mean 0 and deviation 1, over the first dimension."""
        return self._norm("norm", a, epsilon)

    def _norm(self, name: str, a: Tensor, epsilon: float) -> Tensor:
        self._check_rows(name, a)
        if not epsilon >= 0:
            self._refuse(f"{name} with epsilon {epsilon}")
        return self._op(name, a.type, a.shape, a, epsilon)

    def mul_mat(self, weight: Tensor, x: Tensor) -> Tensor:
        """weight (in, out) x (in, tokens) → (out, tokens), F32."""
        self._check_rows("mul_mat", x)
        is_plain = weight.struct.nb[0] == weight.type.block_bytes and self._lib.multiplies(weight.type)
        if weight.shape[0] != x.shape[0] or len(weight.shape) != 2 or not is_plain:
            self._refuse(f"mul_mat of {weight.shape} {weight.type.name} and {x.shape} {x.type.name}")
        return self._op("mul_mat", TensorType.F32, (weight.shape[1], *x.shape[1:]), weight, x)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up"""
        self._check_rows("swiglu", gate, up)
        if gate.shape != up.shape or not is_contiguous(gate) or not is_contiguous(up):
            self._refuse(f"swiglu of {gate.shape} and {up.shape}")
        return self._op("swiglu_split", gate.type, gate.shape, gate, up)

    def swiglu_clamped(self, gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
        """gate * sigmoid(alpha * gate) * (up + 1), of a gate up to `limit` and an up within it. Source: gpt-oss."""
        self._check_rows("swiglu_oai", gate, up)
        if gate.shape != up.shape or not is_contiguous(gate) or not is_contiguous(up):
            self._refuse(f"swiglu_oai of {gate.shape} and {up.shape}")
        return self._op("swiglu_oai", gate.type, gate.shape, gate, up, alpha, limit)

    def swiglu_halves(self, a: Tensor) -> Tensor:
        """silu(first half) * second half, of the first dimension."""
        self._check_rows("swiglu", a)
        if a.shape[0] % 2 or not is_contiguous(a):
            self._refuse(f"swiglu of the halves of {a.shape}")
        return self._op("swiglu", a.type, (a.shape[0] // 2, *a.shape[1:]), a)

    def sigmoid(self, a: Tensor) -> Tensor:
        return self._elementwise("sigmoid", a)

    def tanh(self, a: Tensor) -> Tensor:
        return self._elementwise("tanh", a)

    def relu(self, a: Tensor) -> Tensor:
        return self._elementwise("relu", a)

    def scale(self, a: Tensor, factor: float, bias: float = 0.0) -> Tensor:
        """`a * factor + bias`"""
        return self._elementwise("scale_bias", a, factor, bias)

    def _elementwise(self, name: str, a: Tensor, *numbers: float) -> Tensor:
        self._check_rows(name, a)
        return self._op(name, a.type, a.shape, a, *numbers)

    def gelu(self, a: Tensor) -> Tensor:
        """0.5 a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))), as a * sigmoid of twice what tanh takes.

        ggml's own looks it up in a table of half precision: its error, 3e-4, shows in logits of F32 weights.
        """
        twice = sqrt(8 / pi)
        inner = self.mul(self.scale(self.mul(a, a), 0.044715 * twice, twice), a)
        return self.mul(a, self.sigmoid(inner))

    def get_rows(self, a: Tensor, rows: Tensor) -> Tensor:
        """a (n, any) F32, rows (k,) I32 → (n, k). The caller vouches for the range of `rows`."""
        self._check_rows("get_rows", a)
        if rows.type is not TensorType.I32 or len(a.shape) != 2 or len(rows.shape) != 1:
            self._refuse(f"get_rows of {a.shape} by {rows.shape} {rows.type.name}")
        return self._op("get_rows", a.type, (a.shape[0], rows.shape[0]), a, rows)

    def set_rows(self, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        """Store the rows of `b` (n, k) F32 at `rows` (k,) I64 of `a` (n, any). The caller vouches for their range."""
        self._check_rows("set_rows", b)
        fits = a.shape[0] == b.shape[0] and b.shape[1:] == rows.shape and rows.type is TensorType.I64
        if not fits or len(a.shape) != 2 or len(b.shape) != 2 or a.type not in _CACHEABLE:
            self._refuse(f"set_rows of {b.shape} into {a.shape} {a.type.name} at {rows.shape} {rows.type.name}")
        return self._op("set_rows", a.type, a.shape, a, b, rows)

    def rope(self, a: Tensor, positions: Tensor, rope: Rope, factors: Tensor | None) -> Tensor:
        """Rotate (head_dim, heads, tokens). `factors` (num_dims / 2,) F32 divide the frequencies."""
        self._check_rows("rope", a)
        fits = len(a.shape) == 3 and positions.shape == a.shape[2:] and positions.type is TensorType.I32
        if not fits or not 0 < rope.num_dims <= a.shape[0] or rope.num_dims % 2:
            self._refuse(f"rope of {a.shape} by {positions.shape} {positions.type.name}, {rope.num_dims} dimensions")
        if factors is not None and (factors.shape[0] < rope.num_dims // 2 or factors.type is not TensorType.F32):
            self._refuse(f"rope factors {factors.shape} {factors.type.name}")
        return self._op(
            "rope_ext", a.type, a.shape, a, positions, factors, rope.num_dims, _ROPE_MODE[rope.layout],
            rope.original_context_tokens, rope.base, 1.0 / rope.factor,
            rope.ext_factor if rope.scaling is RopeScaling.YARN else 0.0,
            rope.attn_factor, rope.beta_fast, rope.beta_slow,
        )  # fmt: skip

    def flash_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q (d, tokens, heads), k and v (d, rows, kv heads), mask (rows, tokens) F16 → (d, heads, tokens).

        `softcap`, where it is not 0: scores become softcap * tanh(score / softcap). `sinks` (heads,) are scores of
        nothing: they take their share of attention. Of several sequences all have a
        fourth dimension, before which the mask has a third of 1.
        """
        self._check_rows("flash_attention", q)
        sequences = q.shape[3:]
        fits = (
            len(q.shape) == len(k.shape) in (3, 4)
            and q.shape[0] == k.shape[0] == v.shape[0]
            and k.shape == v.shape
            and k.shape[3:] == sequences
            and q.shape[2] % k.shape[2] == 0
            and mask.shape == (k.shape[1], q.shape[1], *((1, *sequences) if sequences else ()))
            and mask.type is TensorType.F16
            and {k.type, v.type} <= _CACHEABLE
            and (sinks is None or (sinks.shape == q.shape[2:3] and sinks.type is TensorType.F32))
        )
        if not fits:
            self._refuse(f"flash_attention of q {q.shape}, k {k.shape}, v {v.shape}, mask {mask.shape}")
        shape = (q.shape[0], q.shape[2], q.shape[1], *sequences)
        result = self._op("flash_attn_ext", TensorType.F32, shape, q, k, v, mask, scale, 0.0, softcap)
        self._lib.flash_attn_ext_set_prec(result.address, _PREC_F32)
        if sinks is not None:
            self._lib.flash_attn_ext_add_sinks(result.address, sinks.address)
        return result

    # finish

    def expand(self, *results: Tensor) -> None:
        """Append what the results need, in this order, to the graph."""
        for result in results:
            self._lib.build_forward_expand(self._graph, result.address)

    def build(self, workspace: Workspace) -> Graph:
        """The graph, with its intermediates placed: ready to bind and run where the workspace is. Raises ComputeError,
        OutOfDeviceMemory.
        """
        graph = self.finish()
        try:
            workspace.place(graph)
        except ComputeError:
            graph.free()
            raise
        return graph

    def finish(self) -> Graph:
        """The graph without memory for intermediates: for measuring. It owns what this builder allocated."""
        leaves = [Leaf(name, tensor.address) for name, tensor in self._leaves.items()]
        context, self._context = self._context, 0
        return Graph(self._lib, context, self._graph, leaves)

    def free(self) -> None:
        """Give the context back without building. Nothing is left to free once `build` or `finish` was called."""
        if self._context:
            self._lib.free(self._context)
            self._context = 0

    def _new(self, type_: TensorType, shape: tuple[int, ...]) -> Tensor:
        if not 1 <= len(shape) <= 4 or min(shape) < 1 or shape[0] % type_.block_elems:
            self._refuse(f"a tensor of shape {shape} and type {type_.name}")
        self._count()
        address = self._lib.new_tensor(self._context, int(type_), len(shape), (c_int64 * len(shape))(*shape))
        return Tensor(int(address), type_, shape)

    def _op(self, name: str, type_: TensorType, shape: tuple[int, ...], *arguments: object) -> Tensor:
        self._count()
        plain = [a.address if isinstance(a, Tensor) else a for a in arguments]
        return Tensor(int(getattr(self._lib, name)(self._context, *plain)), type_, shape)

    def _count(self) -> None:
        self._num_tensors += 1
        assert self._num_tensors <= self._max_nodes, "raise max_nodes of this Builder"

    def _check_rows(self, op: str, *tensors: Tensor) -> None:
        """Kernels of activations want F32, side by side along the first dimension."""
        for tensor in tensors:
            if tensor.type is not TensorType.F32 or tensor.struct.nb[0] != TensorType.F32.block_bytes:
                self._refuse(f"{op} of {tensor.shape} {tensor.type.name}, {tensor.struct.nb[0]} bytes apart")

    def _check_broadcast(self, op: str, a: Tensor, b: Tensor) -> None:
        self._check_rows(op, a, b)
        padded = b.shape + (1,) * (len(a.shape) - len(b.shape))
        if len(padded) != len(a.shape) or any(n % m for n, m in zip(a.shape, padded, strict=True)):
            self._refuse(f"{op} of {a.shape} and {b.shape}")

    def _refuse(self, what: str) -> NoReturn:
        raise ComputeError(f"cannot build the graph: {what}")
