"""Tensors of a graph under construction, and ops that only look at them otherwise: no bytes move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipo.base.tensor_type import TensorType
from pipo.compute.ggml import GgmlTensor


@dataclass(frozen=True, slots=True)
class Tensor:
    """A node of a graph under construction. `shape` in ggml order, without trailing ones beyond its rank."""

    address: int
    type: TensorType
    shape: tuple[int, ...]

    @property
    def struct(self) -> GgmlTensor:
        return GgmlTensor.from_address(self.address)


class Views(ABC):
    """The views among a Builder's ops. Raises ComputeError where ggml would abort."""

    @abstractmethod
    def _op(self, name: str, type_: TensorType, shape: tuple[int, ...], *arguments: object) -> Tensor: ...

    @abstractmethod
    def _refuse(self, what: str) -> NoReturn: ...

    def reshape(self, a: Tensor, *shape: int) -> Tensor:
        """To rank 2, 3 or 4, without a copy: `a` must lie in one run."""
        if num_elems(a.shape) != num_elems(shape) or len(shape) not in (2, 3, 4) or not is_contiguous(a):
            self._refuse(f"reshape of {a.shape} to {shape}")
        return self._op(f"reshape_{len(shape)}d", a.type, shape, a, *shape)

    def permute(self, a: Tensor, *axes: int) -> Tensor:
        """Axis i of `a` becomes axis `axes[i]`, of the first three; a fourth stays. Rank 3 or 4."""
        if sorted(axes) != [0, 1, 2] or len(a.shape) not in (3, 4):
            self._refuse(f"permute of {a.shape} by {axes}")
        shape = (*(a.shape[axes.index(i)] for i in range(3)), *a.shape[3:])
        return self._op("permute", a.type, shape, a, *axes, 3)

    def slice_rows(self, a: Tensor, first: int, num: int) -> Tensor:
        """Elements first, first + 1, … of every row of `a` (n, tokens), without a copy: (num, tokens)."""
        if len(a.shape) != 2 or first < 0 or num < 1 or first + num > a.shape[0] or a.type.block_elems != 1:
            self._refuse(f"elements {first} to {first + num} of the rows of {a.shape} {a.type.name}")
        size, row_bytes = a.type.row_bytes(1), a.type.row_bytes(a.shape[0])
        return self._op("view_2d", a.type, (num, a.shape[1]), a, num, a.shape[1], row_bytes, first * size)

    def slice_heads(self, a: Tensor, first: int, head_dim: int, num_heads: int) -> Tensor:
        """As `slice_rows`, of heads that lie side by side: (head_dim, heads, tokens)."""
        rows = self.slice_rows(a, first, head_dim * num_heads)
        size, row_bytes, shape = a.type.row_bytes(1), a.type.row_bytes(a.shape[0]), (head_dim, num_heads, rows.shape[1])
        return self._op("view_3d", a.type, shape, a, *shape, head_dim * size, row_bytes, first * size)

    def every_row(self, a: Tensor, first: int, step: int) -> Tensor:
        """Rows first, first + step, … of `a` (n, any), without a copy."""
        if len(a.shape) != 2 or not 0 <= first < step or a.shape[1] % step:
            self._refuse(f"every {step}th row of {a.shape} from {first} on")
        shape, row_bytes = (a.shape[0], a.shape[1] // step), a.type.row_bytes(a.shape[0])
        return self._op("view_2d", a.type, shape, a, *shape, step * row_bytes, first * row_bytes)

    def heads_view(
        self, rows: Tensor, head_dim: int, num_heads: int, num_rows: int, num_sequences: int = 1, stride_rows: int = 0
    ) -> Tensor:
        """The first `num_rows` rows of a KV cache (heads * head_dim, any) as (head_dim, num_rows, heads); of several
        sequences, each of which begins `stride_rows` after the last one, as (head_dim, num_rows, heads, sequences).
        """
        num_seen = (num_sequences - 1) * stride_rows + num_rows
        fits = len(rows.shape) == 2 and head_dim * num_heads == rows.shape[0] and num_seen <= rows.shape[1]
        if not fits or head_dim % rows.type.block_elems:
            self._refuse(f"{num_heads} heads of {head_dim} over {num_rows} rows of {rows.shape} {rows.type.name}")
        row_bytes = rows.type.row_bytes(rows.shape[0])
        head_bytes = rows.type.row_bytes(head_dim)
        shape = (head_dim, num_rows, num_heads)
        if num_sequences == 1:
            return self._op("view_3d", rows.type, shape, rows, *shape, row_bytes, head_bytes, 0)
        strides = (row_bytes, head_bytes, stride_rows * row_bytes)
        shape_of_all = (*shape, num_sequences)
        return self._op("view_4d", rows.type, shape_of_all, rows, *shape_of_all, *strides, 0)

    def tokens(self, a: Tensor, first: int, num: int) -> Tensor:
        """Entries first, first + 1, … of the last dimension of `a`, which has up to three, without a copy."""
        rank, nb = len(a.shape), a.struct.nb
        if rank > 3 or first < 0 or num < 1 or first + num > a.shape[-1]:
            self._refuse(f"{num} of the last dimension of {a.shape} from {first} on")
        if num == a.shape[-1]:
            return a
        shape = (*a.shape[:-1], num)
        return self._op(f"view_{rank}d", a.type, shape, a, *shape, *nb[1:rank], first * nb[rank - 1])

    def apart(self, a: Tensor) -> Tensor:
        """Each entry of the last dimension of `a` as one of its own, without a copy: (n, T) → (n, 1, T), (n, m, T) →
        (n, m, 1, T).
        """
        rank, step = len(a.shape), a.struct.nb[len(a.shape) - 1]
        if rank not in (2, 3):
            self._refuse(f"what is apart in {a.shape}")
        shape = (*a.shape[:-1], 1, a.shape[-1])
        return self._op(f"view_{rank + 1}d", a.type, shape, a, *shape, *a.struct.nb[1 : rank - 1], step, step, 0)

    def flat(self, a: Tensor) -> Tensor:
        """(n, m, T), whose rows of n lie side by side, as (n * m, T), without a copy."""
        if len(a.shape) != 3 or a.struct.nb[1] != a.type.row_bytes(a.shape[0]):
            self._refuse(f"{a.shape} as rows")
        shape = (a.shape[0] * a.shape[1], a.shape[2])
        return self._op("view_2d", a.type, shape, a, *shape, a.struct.nb[2], 0)

    def part(self, a: Tensor, first: int, *shape: int) -> Tensor:
        """Elements first, first + 1, … of `a` (any,) in a shape of rank 2 or 4, without a copy."""
        size = a.type.row_bytes(1)
        if len(a.shape) != 1 or len(shape) not in (2, 4) or not 0 <= first <= a.shape[0] - num_elems(shape):
            self._refuse(f"{shape} of {a.shape} from {first} on")
        strides = [size * num_elems(shape[:i]) for i in range(1, len(shape))]
        return self._op(f"view_{len(shape)}d", a.type, shape, a, *shape, *strides, first * size)


def is_contiguous(tensor: Tensor) -> bool:
    """Its elements lie side by side, in order."""
    struct, num_bytes = tensor.struct, tensor.type.row_bytes(tensor.shape[0])
    for i in range(1, len(tensor.shape)):
        if struct.nb[i] != num_bytes and struct.ne[i] != 1:
            return False
        num_bytes *= tensor.shape[i]
    return bool(struct.nb[0] == tensor.type.block_bytes)


def num_elems(shape: Sequence[int]) -> int:
    """Of a tensor of this shape."""
    product = 1
    for n in shape:
        product *= n
    return product
