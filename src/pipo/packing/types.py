"""Which type each tensor of a packed file gets.

What moves in a pass is quantised: the matrices of the stages, and the embedding table. What always stays in RAM (norms,
biases, routers, rope factors) is F32, as the engine wants it. The table of fallbacks is llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from pipo.base.errors import UnsupportedModel, UsageError
from pipo.base.manifest import EMBEDDING_TABLE, Manifest, TensorSpec
from pipo.base.tensor_type import TensorType

TABLES = frozenset({EMBEDDING_TABLE, "output.weight"})
_VALUES_AND_DOWN = re.compile(r"blk\.(\d+)\.(?:attn_v|ffn_down(?:_exps|_shexp)?)\.weight")
_FUSED = re.compile(r"blk\.\d+\.attn_qkv\.weight")
# Rows of the tables are words: an error in one is seen whole, not averaged over a product. Below this they get Q6_K.
TABLE_TYPE = TensorType.Q6_K


@dataclass(frozen=True, slots=True)
class Mix:
    """What `--type` names. `file_type` is what llama.cpp calls such a file: `enum llama_ftype` of llama.h.

    `more` is for the matrices that gain most from it, values and what leaves the MLP, in the first and the last eighth
    of the blocks and every third between; `fused` for one that holds queries, keys and values. Source:
    `llama_tensor_get_type` of llama.cpp, without what it does for single models.
    """

    type: TensorType
    file_type: int
    suffix: str = ""
    more: TensorType | None = None
    fused: TensorType | None = None

    @property
    def name(self) -> str:
        return f"{self.type.name}{self.suffix}"


# Those that are of use without an importance matrix: libggml refuses IQ1 and most of IQ2 without one, and IQ3 is worse
# than Q3_K then.
MIXES: dict[str, Mix] = {
    mix.name.lower(): mix
    for mix in (
        Mix(TensorType.F32, 0),
        Mix(TensorType.F16, 1),
        Mix(TensorType.BF16, 32),
        Mix(TensorType.Q8_0, 7),
        Mix(TensorType.Q6_K, 18),
        Mix(TensorType.Q5_K, 17, "_M", more=TensorType.Q6_K, fused=TensorType.Q6_K),
        Mix(TensorType.Q5_K, 16),
        Mix(TensorType.Q5_1, 9),
        Mix(TensorType.Q5_0, 8),
        Mix(TensorType.Q4_K, 15, "_M", more=TensorType.Q6_K, fused=TensorType.Q5_K),
        Mix(TensorType.Q4_K, 14),
        Mix(TensorType.Q4_1, 3),
        Mix(TensorType.Q4_0, 2),
        Mix(TensorType.IQ4_NL, 25),
        Mix(TensorType.IQ4_XS, 30),
        Mix(TensorType.Q3_K, 11),
        Mix(TensorType.Q2_K, 10),
    )
}
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h

_NEXT_TYPE = {
    TensorType.Q2_K: TensorType.Q4_0,
    TensorType.Q3_K: TensorType.Q4_0,
    TensorType.IQ4_XS: TensorType.IQ4_NL,
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}
_MATRIX = ".weight"  # experts have biases of two dimensions
_WIDENED = (TensorType.F16, TensorType.BF16)
_PLAIN = (TensorType.F32, TensorType.F16, TensorType.BF16)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor on its way. `wanted` differs from `type` where the type's block does not divide the rows.

    `head_rows`, if not 0: the rows of each head lie as two halves in the source, and become pairs side by side.
    `is_repacked`: of the same type, as a repacked kernel wants it.
    """

    source: TensorSpec
    type: TensorType
    wanted: TensorType
    head_rows: int = 0
    is_repacked: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def stored_type(self) -> TensorType:
        """In the source's file."""
        conversion = self.source.conversion
        return conversion.stored if conversion is not None else self.source.type

    @property
    def added(self) -> float:
        """To each element."""
        return self.source.conversion.added if self.source.conversion is not None else 0.0

    @property
    def is_computed(self) -> bool:
        """It has no bytes in the source."""
        return bool(self.source.values)

    @property
    def is_copied(self) -> bool:
        is_same = self.type is self.stored_type and not self.added and not self.is_computed
        return is_same and not self.is_repacked

    @property
    def is_requantised(self) -> bool:
        """What it loses was decided twice."""
        return self.type is not self.stored_type and self.stored_type not in _PLAIN

    @property
    def row_elems(self) -> int:
        """Of what moves as one; of a vector whose elements change places, one."""
        return 1 if self.head_rows and len(self.source.shape) == 1 else self.source.shape[0]

    @property
    def run_rows(self) -> int:
        """Rows from one place of the source, which a group does not leave."""
        return self.head_rows or (self.source.shape[1] if self.source.slices else self.num_rows)

    @property
    def num_rows(self) -> int:
        return self.num_elems // self.row_elems

    @property
    def num_elems(self) -> int:
        num_elems = 1
        for size in self.source.shape:
            num_elems *= size
        return num_elems

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.row_elems)

    @property
    def source_row_bytes(self) -> int:
        return 0 if self.is_computed else self.stored_type.row_bytes(self.row_elems)

    @property
    def source_bytes(self) -> int:
        """Read for it."""
        return self.num_rows * self.source_row_bytes

    @property
    def num_bytes(self) -> int:
        return self.type.nbytes(self.source.shape)


def parse_mix(text: str) -> Mix:
    """`"q4_0"`, whatever its case. Raises UsageError naming those there are."""
    mix = MIXES.get(text.lower())
    if mix is None:
        raise UsageError(f"--type {text!r:.80} is not a type to pack to", hint=f"one of {', '.join(MIXES)}")
    return mix


def plan_tensor(spec: TensorSpec, mix: Mix, num_layers: int, *, moves: bool, head_rows: int = 0) -> TensorPlan:
    """`moves`: it is a matrix of a stage, or the embedding table. `head_rows` as TensorPlan has it."""
    wanted = _wanted(spec, mix, num_layers) if moves else _kept(spec)
    if wanted is spec.type:
        return TensorPlan(spec, wanted, wanted, head_rows)
    return TensorPlan(spec, fitting(wanted, spec.shape[0]), wanted, head_rows)


def fitting(type_: TensorType, row_elems: int) -> TensorType:
    """The type, or the next one whose block divides the row."""
    while row_elems % type_.block_elems:
        type_ = _NEXT_TYPE.get(type_, TensorType.F16)
    return type_


def check_readable(manifest: Manifest, plans: Collection[TensorPlan], decodes: Collection[TensorType]) -> None:
    """Raises UnsupportedModel where a tensor would have to be decoded and this libggml cannot."""
    for plan in plans:
        if not plan.is_copied and plan.stored_type not in decodes:
            raise UnsupportedModel(f"{manifest.name}: {plan.name} is {plan.stored_type.name}, which cannot be decoded")


def _wanted(spec: TensorSpec, mix: Mix, num_layers: int) -> TensorType:
    if len(spec.shape) < 2 or not spec.name.endswith(_MATRIX):
        return _kept(spec)
    if spec.name in TABLES and _bits(mix.type) < _bits(TABLE_TYPE):
        return TABLE_TYPE
    found = _VALUES_AND_DOWN.fullmatch(spec.name)
    if mix.more is not None and found and _gains(int(found[1]), num_layers):
        return mix.more
    return mix.fused if mix.fused is not None and _FUSED.fullmatch(spec.name) else mix.type


def _kept(spec: TensorSpec) -> TensorType:
    return TensorType.F32 if spec.type in _WIDENED else spec.type


def _gains(block_idx: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return block_idx < eighth or block_idx >= 7 * num_layers // 8 or (block_idx - eighth) % 3 == 2


def _bits(type_: TensorType) -> float:
    return 8 * type_.block_bytes / type_.block_elems
