"""What a checkpoint holds, in the project's own words. `formats/` fills it; everything above reads only this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NewType

from pipo.base.file_identity import FileIdentity
from pipo.base.tensor_type import TensorType

FileIdx = NewType("FileIdx", int)

EMBEDDING_TABLE = "token_embd.weight"  # in every model, whichever format it comes from


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in one of the checkpoint's files."""

    file_idx: FileIdx
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a small tensor that stays in memory as F32 is made from the file: elements of `stored`, each plus `added`."""

    stored: TensorType
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor. `shape` is in ggml order: fastest dimension first, so (in, out) for a weight matrix.

    Its bytes are those of `extent`, but for three kinds. A vector may be converted on its way to memory; or be computed
    from the header, with its `values` here and no bytes in the file. The matrices of a three-dimensional one may lie
    apart, in `slices`, of which `extent` is the first. `is_repacked`: they are there as a repacked kernel wants them.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    extent: Extent
    conversion: Conversion | None = None
    values: tuple[float, ...] = ()
    slices: tuple[Extent, ...] = ()
    is_repacked: bool = False

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self.type.nbytes(self.shape)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """All its bytes in the files."""
        return self.slices or (self.extent,)

    def repacked_in(self, file_idx: int) -> TensorSpec:
        """The same, with repacked bytes at the same offset of this file."""
        return replace(self, extent=replace(self.extent, file_idx=FileIdx(file_idx)), is_repacked=True)

    def matrix(self, idx: int) -> TensorSpec:
        """One matrix of a three-dimensional tensor, named `blk.0.ffn_up_exps.weight[3]`."""
        extent = self.slices[idx] if self.slices else self._slice(idx)
        return replace(self, name=f"{self.name}[{idx}]", shape=self.shape[:2], extent=extent, slices=())

    def _slice(self, idx: int) -> Extent:
        size = self.type.nbytes(self.shape[:2])
        return Extent(self.extent.file_idx, self.extent.offset + idx * size, size)


class RopeScaling(Enum):
    NONE = "none"
    LINEAR = "linear"
    YARN = "yarn"
    FREQ_FACTORS = "freq_factors"  # Llama 3: divisors per frequency, kept in the tensor rope_freqs.weight
    # Phi: divisors for contexts up to the original one, in rope_factors_short.weight, and for longer ones, in _long
    LONGROPE = "longrope"


class RopeLayout(Enum):
    """Which elements form a rotated pair: neighbours (NORMAL) or halves (NEOX)."""

    NORMAL = "normal"
    NEOX = "neox"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, in the terms of ggml's `rope_ext`."""

    num_dims: int
    base: float
    layout: RopeLayout = RopeLayout.NORMAL
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0  # context grows by this; rope_ext wants 1 / factor
    original_context_tokens: int = 0  # YaRN, LONGROPE
    attn_factor: float = 1.0  # goes to rope_ext as it is; ggml adds YaRN's 1 + 0.1 ln(factor) itself if ext_factor
    ext_factor: float = 1.0  # YaRN: mix of extrapolation; must reach rope_ext as 0 without YaRN
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_for_long: bool = False  # LONGROPE: for a context longer than the original one

    def at(self, context_tokens: int) -> Rope:
        """For a context of so many tokens."""
        return replace(self, is_for_long=context_tokens > self.original_context_tokens)


@dataclass(frozen=True, slots=True)
class HyperParameters:
    architecture: str  # as the file names it: "llama", …
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int  # what the model was trained for
    norm_epsilon: float
    rope: Rope
    num_experts: int = 0  # routed ones of a block; 0: a dense model
    num_experts_per_tok: int = 0
    expert_size: int = 0  # intermediate size of a routed expert; 0: the file does not say
    shared_expert_size: int = 0  # of the expert that every token passes; 0: the file does not say
    sliding_window: int = 0  # tokens that a sliding layer sees, the newest included; 0: nothing slides
    sliding_layers: tuple[bool, ...] = ()  # by layer; empty: none
    local_rope: Rope | None = None  # of sliding layers, where it is another (Gemma 3)
    unrotated_layers: tuple[bool, ...] = ()  # by layer: no rotary embedding (SmolLM 3); empty: none
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    final_softcap: float = 0.0  # the same of logits
    embedding_scale: float = 1.0  # of the rows of the embedding table


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint: where every byte lies and what the numbers mean. Holds no tensor data.

    `extra` are hyper-parameters of the architecture (keys without its prefix) that have no field in
    HyperParameters; a family must either know them or refuse the file.
    """

    name: str
    files: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]  # of `files`, when their headers were read
    hyper: HyperParameters
    tensors: Mapping[str, TensorSpec]
    extra: Mapping[str, object]

    @property
    def num_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors.values())
