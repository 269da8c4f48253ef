"""A model as a flat list of stages that name their tensors. Stages know shapes and ops, never where weights live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from pipo.base.manifest import HyperParameters, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.compute.graphs import Builder, WeightType
from pipo.compute.views import Tensor


class StageKind(Enum):
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"  # those of a block that the router, which is computed with its attention, chose
    FINAL_NORM = "final_norm"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Tokens of a pass whose attention is one op: all of one sequence, or one each of `num_sequences`, whose rows
    begin `stride_rows` one after another. Where there are fewer tokens than those, some sequences take part in vain.

    `num_kv_rows` is the KV length rounded up to a class.
    """

    num_tokens: int
    num_kv_rows: int
    num_sequences: int = 1
    stride_rows: int = 0

    @property
    def num_queries(self) -> int:
        return self.num_sequences if self.num_sequences > 1 else self.num_tokens

    @property
    def is_spread(self) -> bool:
        """Some sequences have no token."""
        return self.num_queries > self.num_tokens

    @property
    def mask_size(self) -> int:
        return self.num_kv_rows * self.num_queries

    @property
    def num_cache_rows(self) -> int:
        """From the first row of the first sequence on."""
        return (self.num_sequences - 1) * self.stride_rows + self.num_kv_rows


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """What a graph depends on besides its weights. Graphs are built once per class.

    `num_tokens` are those of all `groups`, one group after another; `num_outputs` the rows that reach the head. The
    first `num_apart` tokens are each the only one of their sequence, and not alone.
    """

    num_tokens: int
    groups: tuple[KvGroup, ...]
    num_outputs: int
    kv_type_k: TensorType
    kv_type_v: TensorType
    num_apart: int = 0

    @property
    def is_plain(self) -> bool:
        """One attention gives the rows of the pass, in order."""
        return len(self.groups) == 1 and not self.groups[0].is_spread


class Sum(Enum):
    """Where the results of experts are added up. All of them add in the order of the experts' numbers."""

    AT_ONCE = "at once"  # all experts of the only token, straight onto the hidden state
    LATER = "later"  # each into its row of `expert_out`: some experts are not there yet
    NOW = "now"  # rows of `expert_out` onto the hidden state
    IN_ORDER = "in order"  # one expert onto its rows of the hidden state, after those before it


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """`num_experts` that are computed in one graph, each with `num_rows` of the pass's `num_tokens`."""

    sum: Sum
    num_tokens: int
    num_experts: int = 0
    num_rows: int = 1


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """The routed experts of a block. `matrices` by role: (in, out, experts), side by side in the file or apart.
    `biases` where there are any, (out, experts), are vectors of the stage.
    """

    matrices: Mapping[str, TensorSpec]
    num_experts: int
    num_experts_per_tok: int
    renormalise: bool  # the weights of those that a token passes add up to 1
    lay: Callable[[StageBuilder, ExpertShape], None]
    biases: Mapping[str, TensorSpec] = field(default_factory=dict)

    def expert(self, expert_idx: int) -> dict[str, TensorSpec]:
        """One expert's matrices (in, out) by role."""
        return {role: spec.matrix(expert_idx) for role, spec in self.matrices.items()}


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a pass: its weights by role, and how to lay its ops over them.

    `matrices` are the stage's unit: they move. `vectors` (norms, biases, rope factors, routers) are small and always
    resident. A stage of EXPERTS has a `bank` of units instead of matrices, and lays its ops with that.
    """

    kind: StageKind
    block_idx: int  # -1 outside the blocks
    matrices: Mapping[str, TensorSpec]
    vectors: Mapping[str, TensorSpec]
    lay: Callable[[StageBuilder], None]
    bank: ExpertBank | None = None

    @property
    def specs(self) -> list[TensorSpec]:
        """Of all that moves, experts as the file has them."""
        return [*self.matrices.values(), *(self.bank.matrices.values() if self.bank else ())]

    def with_specs(self, other: Callable[[TensorSpec], TensorSpec]) -> Stage:
        """The same stage over weights that lie elsewhere."""
        bank = self.bank and replace(self.bank, matrices=_with_specs(self.bank.matrices, other))
        return replace(self, matrices=_with_specs(self.matrices, other), bank=bank)

    def signature(self, is_repacked: Callable[[str], bool]) -> tuple[object, ...]:
        """Equal for stages whose graphs are the same but for the addresses of their weights."""
        weights = [(spec.shape, spec.type, is_repacked(spec.name)) for spec in self.specs]
        vectors = [(role, spec.shape, spec.type) for role, spec in self.vectors.items()]
        return (self.kind, self.lay, *self.matrices, *weights, *vectors)


def _with_specs(matrices: Mapping[str, TensorSpec], other: Callable[[TensorSpec], TensorSpec]) -> dict[str, TensorSpec]:
    return {role: other(spec) for role, spec in matrices.items()}


def banks_of(stages: Sequence[Stage]) -> list[ExpertBank]:
    """The routed experts of a model, block by block; none of a dense one."""
    return [stage.bank for stage in stages if stage.bank is not None]


@dataclass(frozen=True, slots=True)
class Correction:
    """What an adapter adds to a product: B (scale * A x), with a scale for each row of x.

    Its leaves: `{role}.lora_a.{adapter}`, `{role}.lora_b.{adapter}`, and `scale` (1, T) F32, which corrections share.
    """

    role: str
    adapter: int  # its place among those of the pass
    scale: str
    type_a: TensorType
    type_b: TensorType
    rank: int

    @property
    def leaf_a(self) -> str:
        return f"{self.role}.lora_a.{self.adapter}"

    @property
    def leaf_b(self) -> str:
        return f"{self.role}.lora_b.{self.adapter}"


Corrections = tuple[Correction, ...]  # of one stage, adapter by adapter


class StageBuilder:
    """What a stage lays its ops with: the op builder, the model's numbers, the shape class, its weights and what
    adapters add to its products.
    """

    def __init__(
        self,
        ops: Builder,
        hyper: HyperParameters,
        shape: ShapeClass,
        stage: Stage,
        is_repacked: Callable[[str], bool],
        corrections: Corrections = (),
    ) -> None:
        self.ops = ops
        self.hyper = hyper
        self.shape = shape
        self._stage = stage
        self._is_repacked = is_repacked
        self._corrections = corrections
        self._scales: dict[str, Tensor] = {}
        self.num_corrected = 0

    def has(self, role: str) -> bool:
        return role in self._stage.matrices or role in self._stage.vectors

    def size_of(self, role: str) -> int:
        """Elements of a vector of this stage."""
        return self._stage.vectors[role].shape[0]

    def weight(self, role: str) -> Tensor:
        """A matrix (in, out) or vector (n,) of this stage, as a leaf named by its role."""
        spec = self._stage.matrices.get(role)
        if spec is not None:
            return self.ops.weight(role, self._layout(spec), *spec.shape)
        spec = self._stage.vectors[role]
        return self.ops.leaf(role, spec.type, *spec.shape)

    def expert_linear(self, role: str, slot: int, x: Tensor) -> Tensor:
        """As `linear`, with the weights of the expert in this place of the graph: leaves named `role.weight.slot`."""
        bank = self._stage.bank
        assert bank is not None
        spec, bias = bank.matrices[f"{role}.weight"], bank.biases.get(f"{role}.bias")
        y = self.ops.mul_mat(self.ops.weight(f"{role}.weight.{slot}", self._layout(spec), *spec.shape[:2]), x)
        if bias is None:
            return y
        return self.ops.add(y, self.ops.leaf(f"{role}.bias.{slot}", bias.type, bias.shape[0]))

    def _layout(self, spec: TensorSpec) -> WeightType:
        return WeightType(spec.type, self._is_repacked(spec.name))

    def linear(self, role: str, x: Tensor) -> Tensor:
        """`weight @ x`, plus what adapters add, plus the bias where the model has one."""
        y = self.ops.mul_mat(self.weight(f"{role}.weight"), x)
        for correction in self._corrections:
            if correction.role == role:
                y = self._corrected(y, correction, x)
        return self.ops.add(y, self.weight(f"{role}.bias")) if self.has(f"{role}.bias") else y

    def _corrected(self, y: Tensor, correction: Correction, x: Tensor) -> Tensor:
        """`y`, and what is added to it: for tokens that are apart by themselves, for all others together."""
        self.num_corrected += 1
        a = self.ops.leaf(correction.leaf_a, correction.type_a, x.shape[0], correction.rank)
        b = self.ops.leaf(correction.leaf_b, correction.type_b, correction.rank, y.shape[0])
        scale, num_apart, num_tokens = self._scale(correction.scale), self.shape.num_apart, x.shape[1]
        if not num_apart:
            return self.ops.add(y, self._scaled(a, b, x, scale))
        if num_apart == num_tokens:
            return self.ops.add(y, self._each_scaled(a, b, x, scale))
        first, rest = ((0, num_apart), (num_apart, num_tokens - num_apart))
        few = self._each_scaled(a, b, self.ops.tokens(x, *first), self.ops.tokens(scale, *first))
        many = self._scaled(a, b, self.ops.tokens(x, *rest), self.ops.tokens(scale, *rest))
        return self.ops.add_to_tokens(self.ops.add_to_tokens(y, few, 0), many, num_apart)

    def _scaled(self, a: Tensor, b: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """B (scale * A x): scaled where rows are shortest. Those of sequences without the adapter are scaled by 0."""
        return self.ops.mul_mat(b, self.ops.mul(self.ops.mul_mat(a, x), scale))

    def _each_scaled(self, a: Tensor, b: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """Tokens of several sequences as so many matrices of a row: ggml multiplies those as it does a single token's,
        so that a sequence gets what it would get alone. F32 rows that stand together take other kernels.
        """
        y = self._scaled(a, b, self.ops.apart(x), self.ops.apart(scale))
        return self.ops.reshape(y, y.shape[0], x.shape[1])

    def _scale(self, name: str) -> Tensor:
        if name not in self._scales:
            self._scales[name] = self.ops.leaf(name, TensorType.F32, 1, self.shape.num_tokens)
        return self._scales[name]

    def rms_norm(self, role: str, x: Tensor) -> Tensor:
        return self.ops.mul(self.ops.rms_norm(x, self.hyper.norm_epsilon), self.weight(f"{role}.weight"))

    def layer_norm(self, role: str, x: Tensor) -> Tensor:
        scaled = self.ops.mul(self.ops.norm(x, self.hyper.norm_epsilon), self.weight(f"{role}.weight"))
        return self.ops.add(scaled, self.weight(f"{role}.bias"))
