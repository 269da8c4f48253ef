"""Models as shapes: what their stages compute, weigh and keep. Source: their published configurations."""

from __future__ import annotations

from dataclasses import dataclass

from pipo.base.machine import StageWork, WeightWork
from pipo.base.tensor_type import TensorType
from pipo.planner.cost import StageCost
from pipo.planner.residency import UnitId


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_mlp_matrices`: 2 in OPT, 3 in Llama (gate, up, down)."""

    name: str
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    vocab_size: int
    num_mlp_matrices: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_q_heads

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def attention_elements(self) -> int:
        return 2 * self.hidden_size * (self.hidden_size + self.kv_width)

    @property
    def mlp_elements(self) -> int:
        return self.num_mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def embedding_elements(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_weights(self) -> int:
        """Input and output embedding both, as the systems compared move them."""
        return self.num_layers * (self.attention_elements + self.mlp_elements) + 2 * self.embedding_elements

    def kv_bytes(self, num_positions: float, bytes_per_element: float) -> float:
        """Of one sequence."""
        return 2 * self.num_layers * self.kv_width * bytes_per_element * num_positions


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("OPT-6.7B", 4096, 32, 16384, 32, 32, 50272),
        Shape("OPT-13B", 5120, 40, 20480, 40, 40, 50272),
        Shape("OPT-30B", 7168, 48, 28672, 56, 56, 50272),
        Shape("OPT-66B", 9216, 64, 36864, 72, 72, 50272),
        Shape("OPT-175B", 12288, 96, 49152, 96, 96, 50272),
        Shape("Llama3.1-8B", 4096, 32, 14336, 32, 8, 128256, num_mlp_matrices=3),
        Shape("Llama3.1-70B", 8192, 80, 28672, 64, 8, 128256, num_mlp_matrices=3),
    )
}


def stages(shape: Shape, weight_type: TensorType, kv_type: TensorType) -> list[StageCost]:
    """Input embedding, attention and MLP of every block, output embedding: each with a unit of its own."""
    kinds = ["embedding", *["attention", "mlp"] * shape.num_layers, "head"]
    make = {
        "embedding": _embedding(shape), "attention": _attention(shape, weight_type, kv_type),
        "mlp": _mlp(shape, weight_type), "head": _head(shape, weight_type),
    }  # fmt: skip
    size = {
        "embedding": shape.embedding_elements, "attention": shape.attention_elements,
        "mlp": shape.mlp_elements, "head": shape.embedding_elements,
    }  # fmt: skip
    kv_bytes = _num_bytes(kv_type, 2 * shape.kv_width)
    return [
        StageCost(
            make[kind], UnitId(i), _num_bytes(weight_type, size[kind]),
            kv_bytes_per_position=kv_bytes if kind == "attention" else 0,
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip


def _num_bytes(type_: TensorType, num_elements: int) -> int:
    return num_elements // type_.block_elems * type_.block_bytes


def _embedding(shape: Shape) -> StageWork:
    return StageWork((), shape.hidden_size)


def _attention(shape: Shape, weight_type: TensorType, kv_type: TensorType) -> StageWork:
    activations = 6 * shape.hidden_size + 2 * shape.kv_width
    cached = shape.num_q_heads * shape.head_dim
    weights = (WeightWork(weight_type, shape.attention_elements),)
    return StageWork(weights, activations, ((kv_type, cached), (kv_type, cached)))


def _mlp(shape: Shape, weight_type: TensorType) -> StageWork:
    activations = shape.num_mlp_matrices * (shape.hidden_size + shape.intermediate_size)
    return StageWork((WeightWork(weight_type, shape.mlp_elements),), activations)


def _head(shape: Shape, weight_type: TensorType) -> StageWork:
    return StageWork((WeightWork(weight_type, shape.embedding_elements),), shape.hidden_size + shape.vocab_size)
