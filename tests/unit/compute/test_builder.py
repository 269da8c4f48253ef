"""compute.graphs: the builder refuses what ggml would answer with abort()."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipo.base.errors import ComputeError
from pipo.base.manifest import Rope
from pipo.base.tensor_type import TensorType
from pipo.compute.graphs import Builder, WeightType
from pipo.compute.views import Tensor

F32, F16, Q4_0, Q8_0 = TensorType.F32, TensorType.F16, TensorType.Q4_0, TensorType.Q8_0
I32, I64 = TensorType.I32, TensorType.I64


def leaf(ops: Builder, *shape: int, type: TensorType = F32) -> Tensor:
    return ops.leaf(f"leaf {ops._num_tensors}", type, *shape)


def turned(ops: Builder, *shape: int) -> Tensor:
    """Of this shape, but the first dimension is not the one that lies side by side."""
    return ops.permute(leaf(ops, shape[1], shape[0], shape[2]), 1, 0, 2)


ROPE = Rope(num_dims=16, base=10000.0)


def attention(ops: Builder, **changes: tuple[int, ...] | Tensor) -> Tensor:
    """4 heads of 32 over 2 of KV, 3 tokens, 256 rows; one argument replaced."""
    shapes: dict[str, tuple[int, ...] | Tensor] = {"q": (32, 3, 4), "k": (32, 256, 2), "v": (32, 256, 2)}
    given = shapes | {"mask": leaf(ops, 256, 3, type=F16)} | changes
    q, k, v, mask = (each if isinstance(each, Tensor) else leaf(ops, *each) for each in given.values())
    return ops.flash_attention(q, k, v, mask, 0.1)


Call = Callable[[Builder], Tensor]

REFUSED: dict[str, Call] = {
    "leaf without a dimension": lambda ops: ops.leaf("x", F32),
    "leaf of five dimensions": lambda ops: ops.leaf("x", F32, 1, 1, 1, 1, 1),
    "leaf of nothing": lambda ops: ops.leaf("x", F32, 4, 0),
    "leaf of half a block": lambda ops: ops.leaf("x", Q4_0, 48, 2),
    "two leaves of one name": lambda ops: list(map(ops.leaf, "xx", (F32, F32), (1, 1)))[-1],
    "repacked weight without kernels": lambda ops: ops.weight("w", WeightType(Q4_0, True), 64, 64),
    "output that is a view": lambda ops: ops.output("y", ops.add_inplace(leaf(ops, 4), leaf(ops, 4))),
    "add of other widths": lambda ops: ops.add(leaf(ops, 4, 2), leaf(ops, 3)),
    "add of more dimensions": lambda ops: ops.add(leaf(ops, 4), leaf(ops, 4, 2)),
    "add of integers": lambda ops: ops.add(leaf(ops, 4, type=I32), leaf(ops, 4, type=I32)),
    "add of turned": lambda ops: ops.add(turned(ops, 4, 5, 6), leaf(ops, 4)),
    "add_inplace of other widths": lambda ops: ops.add_inplace(leaf(ops, 4), leaf(ops, 8)),
    "add_inplace of F16": lambda ops: ops.add_inplace(leaf(ops, 4, type=F16), leaf(ops, 4)),
    "mul of other lengths": lambda ops: ops.mul(leaf(ops, 4, 3), leaf(ops, 4, 2)),
    "mul by F16": lambda ops: ops.mul(leaf(ops, 4), leaf(ops, 4, type=F16)),
    "rms_norm of F16": lambda ops: ops.rms_norm(leaf(ops, 4, type=F16), 1e-5),
    "rms_norm of turned": lambda ops: ops.rms_norm(turned(ops, 4, 5, 6), 1e-5),
    "rms_norm with a negative epsilon": lambda ops: ops.rms_norm(leaf(ops, 4), -1.0),
    "rms_norm with NaN": lambda ops: ops.rms_norm(leaf(ops, 4), math.nan),
    "mul_mat of other widths": lambda ops: ops.mul_mat(leaf(ops, 64, 8), leaf(ops, 32, 2)),
    "mul_mat by a weight of three dimensions": lambda ops: ops.mul_mat(leaf(ops, 64, 8, 2), leaf(ops, 64, 2)),
    "mul_mat of F16 activations": lambda ops: ops.mul_mat(leaf(ops, 64, 8), leaf(ops, 64, 2, type=F16)),
    "mul_mat of turned activations": lambda ops: ops.mul_mat(leaf(ops, 4, 8), turned(ops, 4, 5, 6)),
    "mul_mat by integers": lambda ops: ops.mul_mat(leaf(ops, 64, 8, type=I32), leaf(ops, 64, 2)),
    "mul_mat by Q8_1": lambda ops: ops.mul_mat(leaf(ops, 64, 8, type=TensorType.Q8_1), leaf(ops, 64, 2)),
    "swiglu of other shapes": lambda ops: ops.swiglu(leaf(ops, 8, 2), leaf(ops, 8, 3)),
    "swiglu of other types": lambda ops: ops.swiglu(leaf(ops, 8), leaf(ops, 8, type=F16)),
    "swiglu of integers": lambda ops: ops.swiglu(leaf(ops, 8, type=I32), leaf(ops, 8, type=I32)),
    "swiglu with gaps": lambda ops: ops.swiglu(*[ops.permute(leaf(ops, 4, 5, 6), 0, 2, 1) for _ in range(2)]),
    "reshape to another size": lambda ops: ops.reshape(leaf(ops, 8), 3, 3),
    "reshape to one dimension": lambda ops: ops.reshape(leaf(ops, 4, 2), 8),
    "reshape of permuted": lambda ops: ops.reshape(ops.permute(leaf(ops, 4, 5, 6), 0, 2, 1), 24, 5),
    "permute of two dimensions": lambda ops: ops.permute(leaf(ops, 4, 5), 1, 0),
    "permute twice to one place": lambda ops: ops.permute(leaf(ops, 4, 5, 6), 0, 0, 1),
    "get_rows by floats": lambda ops: ops.get_rows(leaf(ops, 8, 4), leaf(ops, 2)),
    "get_rows of F16": lambda ops: ops.get_rows(leaf(ops, 8, 4, type=F16), leaf(ops, 2, type=I32)),
    "get_rows of three dimensions": lambda ops: ops.get_rows(leaf(ops, 8, 4, 2), leaf(ops, 2, type=I32)),
    "get_rows by a matrix": lambda ops: ops.get_rows(leaf(ops, 8, 4), leaf(ops, 2, 2, type=I32)),
    "set_rows of other widths": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 4, 2), leaf(ops, 2, type=I64)),
    "set_rows at too few": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 8, 3), leaf(ops, 2, type=I64)),
    "set_rows at I32": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 8, 2), leaf(ops, 2, type=I32)),
    "set_rows of F16": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 8, 2, type=F16), leaf(ops, 2, type=I64)),
    "set_rows into integers": lambda ops: ops.set_rows(
        leaf(ops, 8, 4, type=I32), leaf(ops, 8, 2), leaf(ops, 2, type=I64)
    ),
    "set_rows into three dimensions": lambda ops: ops.set_rows(
        leaf(ops, 8, 4, 2), leaf(ops, 8, 2), leaf(ops, 2, type=I64)
    ),
    "heads of other widths": lambda ops: ops.heads_view(leaf(ops, 64, 256), 16, 3, 256),
    "heads beyond the rows": lambda ops: ops.heads_view(leaf(ops, 64, 256), 16, 4, 257),
    "heads of half a block": lambda ops: ops.heads_view(leaf(ops, 64, 256, type=Q8_0), 16, 4, 256),
    "heads of one dimension": lambda ops: ops.heads_view(leaf(ops, 64), 16, 4, 1),
    "rope at other positions": lambda ops: ops.rope(leaf(ops, 16, 4, 3), leaf(ops, 2, type=I32), ROPE, None),
    "rope at floats": lambda ops: ops.rope(leaf(ops, 16, 4, 3), leaf(ops, 3), ROPE, None),
    "rope of too many dimensions": lambda ops: ops.rope(leaf(ops, 8, 4, 3), leaf(ops, 3, type=I32), ROPE, None),
    "rope of odd dimensions": lambda ops: ops.rope(
        leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), replace(ROPE, num_dims=15), None
    ),
    "rope of no dimensions": lambda ops: ops.rope(
        leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), replace(ROPE, num_dims=0), None
    ),
    "rope of a matrix": lambda ops: ops.rope(leaf(ops, 16, 4), leaf(ops, 4, type=I32), ROPE, None),
    "rope of four dimensions": lambda ops: ops.rope(leaf(ops, 16, 4, 3, 2), leaf(ops, 3, 2, type=I32), ROPE, None),
    "rope of integers": lambda ops: ops.rope(leaf(ops, 16, 4, 3, type=I32), leaf(ops, 3, type=I32), ROPE, None),
    "rope by too few factors": lambda ops: ops.rope(leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), ROPE, leaf(ops, 7)),
    "rope by F16 factors": lambda ops: ops.rope(
        leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), ROPE, leaf(ops, 8, type=F16)
    ),
    "attention of other widths": lambda ops: attention(ops, q=(16, 3, 4)),
    "attention of unlike keys and values": lambda ops: attention(ops, v=(32, 512, 2)),
    "attention of heads in no groups": lambda ops: attention(ops, q=(32, 3, 5)),
    "attention of a matrix": lambda ops: attention(ops, q=(32, 3)),
    "attention of another mask": lambda ops: attention(ops, mask=leaf(ops, 256, 4, type=F16)),
    "attention of an F32 mask": lambda ops: attention(ops, mask=(256, 3)),
    "attention of F16 queries": lambda ops: attention(ops, q=leaf(ops, 32, 3, 4, type=F16)),
    "attention of integer keys": lambda ops: attention(ops, k=leaf(ops, 32, 256, 2, type=I32)),
    "attention of turned queries": lambda ops: attention(ops, q=turned(ops, 32, 3, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_ops_are_refused(ops: Builder, name: str) -> None:
    with pytest.raises(ComputeError, match="cannot build the graph"):
        REFUSED[name](ops)


def test_those_ops_are_accepted_when_they_are_right(ops: Builder) -> None:
    """Every builder of REFUSED with arguments that fit: it is the fault that is refused, not the op."""
    rows, positions = leaf(ops, 2, type=I64), leaf(ops, 3, type=I32)
    results = [
        ops.add(leaf(ops, 4, 2), leaf(ops, 4)),
        ops.mul(leaf(ops, 4, 3), leaf(ops, 4)),
        ops.rms_norm(leaf(ops, 4), 1e-5),
        ops.mul_mat(leaf(ops, 64, 8, type=Q4_0), leaf(ops, 64, 2)),
        ops.swiglu(leaf(ops, 8, 2), leaf(ops, 8, 2)),
        ops.reshape(leaf(ops, 4, 2), 2, 2, 2),
        ops.get_rows(leaf(ops, 8, 4), leaf(ops, 2, type=I32)),
        ops.heads_view(ops.set_rows(leaf(ops, 64, 256, type=Q8_0), leaf(ops, 64, 2), rows), 32, 2, 256),
        ops.rope(leaf(ops, 16, 4, 3), positions, ROPE, leaf(ops, 8)),
        ops.permute(leaf(ops, 4, 5, 6), 0, 2, 1),
        attention(ops),
    ]
    for tensor in results:
        assert tuple(tensor.struct.ne)[: len(tensor.shape)] == tensor.shape, "shape as ggml sees it"
        assert tensor.struct.type == tensor.type
