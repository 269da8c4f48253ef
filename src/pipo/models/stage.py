"""A model as a flat list of stages that name their tensors. Stages know shapes and ops, never where weights live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from pipo.base.manifest import HyperParameters, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.compute.graphs import Builder, Tensor, WeightType


class StageKind(Enum):
    ATTENTION = "attention"
    MLP = "mlp"
    FINAL_NORM = "final_norm"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """What a graph depends on besides its weights. Graphs are built once per class.

    `num_tokens` are those of all sequences, of which each has as many; `num_kv_rows` is the KV length rounded up to a
    class, `num_outputs` the rows that reach the head. Where there are several sequences, the rows of each begin
    `kv_stride_rows` after those of the last one.
    """

    num_tokens: int
    num_kv_rows: int
    num_outputs: int
    kv_type_k: TensorType
    kv_type_v: TensorType
    num_sequences: int = 1
    kv_stride_rows: int = 0

    @property
    def tokens_each(self) -> int:
        return self.num_tokens // self.num_sequences


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a pass: its weights by role, and how to lay its ops over them.

    `matrices` are the stage's unit: they move. `vectors` (norms, biases, rope factors) are small and always resident.
    """

    kind: StageKind
    block_idx: int  # -1 outside the blocks
    matrices: Mapping[str, TensorSpec]
    vectors: Mapping[str, TensorSpec]
    lay: Callable[[StageBuilder], None]

    def signature(self, is_repacked: Callable[[str], bool]) -> tuple[object, ...]:
        """Equal for stages whose graphs are the same but for the addresses of their weights."""
        weights = [(role, s.shape, s.type, is_repacked(s.name)) for role, s in self.matrices.items()]
        return (self.kind, *weights, *((role, s.shape) for role, s in self.vectors.items()))


class StageBuilder:
    """What a stage lays its ops with: the op builder, the model's numbers, the shape class and its weights."""

    def __init__(
        self, ops: Builder, hyper: HyperParameters, shape: ShapeClass, stage: Stage, is_repacked: Callable[[str], bool]
    ) -> None:
        self.ops = ops
        self.hyper = hyper
        self.shape = shape
        self._stage = stage
        self._is_repacked = is_repacked

    def has(self, role: str) -> bool:
        return role in self._stage.matrices or role in self._stage.vectors

    def weight(self, role: str) -> Tensor:
        """A matrix (in, out) or vector (n,) of this stage, as a leaf named by its role."""
        spec = self._stage.matrices.get(role)
        if spec is not None:
            layout = WeightType(spec.type, self._is_repacked(spec.name))
            return self.ops.weight(role, layout, *spec.shape)
        spec = self._stage.vectors[role]
        return self.ops.leaf(role, spec.type, *spec.shape)

    def linear(self, role: str, x: Tensor) -> Tensor:
        """`weight @ x`, plus the bias where the model has one."""
        y = self.ops.mul_mat(self.weight(f"{role}.weight"), x)
        return self.ops.add(y, self.weight(f"{role}.bias")) if self.has(f"{role}.bias") else y

    def rms_norm(self, role: str, x: Tensor) -> Tensor:
        return self.ops.mul(self.ops.rms_norm(x, self.hyper.norm_epsilon), self.weight(f"{role}.weight"))
