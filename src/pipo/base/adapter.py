"""LoRA adapters: pairs of small matrices that are added to a model's products. `formats/` fills these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

from pipo.base.errors import MalformedFile, UsageError
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import RopeLayout, TensorSpec

AdapterId = NewType("AdapterId", str)
ADAPTERS = "adapters"  # what they take, by this name in plans and ledgers
MAX_ADAPTERS = 64  # of one engine: each lengthens every graph it has a part in


@dataclass(frozen=True, slots=True)
class LowRank:
    """y = W x + scale * factor * B (A x): `a` is (in, rank), `b` (rank, out), `factor` alpha / rank."""

    a: TensorSpec
    b: TensorSpec
    factor: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.a.num_bytes + self.b.num_bytes


def low_rank(path: Path, a: TensorSpec, b: TensorSpec, factor: float) -> LowRank:
    """Raises MalformedFile where the two are no pair."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise MalformedFile(
            f"{path}: {a.name} has shape {a.shape} and {b.name} {b.shape}, wanted (in, rank) and (rank, out)"
        )
    return LowRank(a, b, factor)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's header. Holds no tensor data.

    `parts` by the name of the tensor that each is added to, as the model has it. `architecture` is None where the file
    does not say. `rows` is the order in which each head's rows of queries and keys lie.
    """

    path: Path
    name: str
    file: Path
    identity: FileIdentity
    architecture: str | None
    rows: RopeLayout
    parts: Mapping[str, LowRank]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def factors(self) -> tuple[float, ...]:
        """Each once: all parts have the same, but for adapters whose parts differ in rank or alpha."""
        return tuple(sorted({part.factor for part in self.parts.values()}))

    @property
    def rank_text(self) -> str:
        ranks = {part.rank for part in self.parts.values()}
        least, most = min(ranks), max(ranks)
        return f"rank {most}" if least == most else f"ranks {least} to {most}"


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """An adapter that was asked for. Raises UsageError for a scale that is no number."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale, str(self.path))


def check_scale(scale: object, of: str) -> None:
    """Raises UsageError."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UsageError(f"adapter {of!s:.200}: scale {scale!r:.40} is not a finite number", hint="1 is as trained")


def parse_choice(text: str) -> AdapterChoice:
    """`"PATH"` or `"PATH:SCALE"`: behind the last colon is a scale where it is a number, and no file is named so."""
    path, colon, scale = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return AdapterChoice(Path(text))
    try:
        return AdapterChoice(Path(path), float(scale))
    except ValueError:
        return AdapterChoice(Path(text))


def choices_of(wanted: object) -> tuple[AdapterChoice, ...]:
    """What a program writes: a path, with ":SCALE" behind it or not, a pair of path and scale, or several of either.

    Raises UsageError.
    """
    if isinstance(wanted, str | Path | AdapterChoice) or _is_pair(wanted):
        wanted = [wanted]
    if not isinstance(wanted, list | tuple):
        raise UsageError(f"lora must be paths, or pairs of path and scale, not {wanted!r:.80}")
    return tuple(_choice(each) for each in wanted)


def _is_pair(found: object) -> bool:
    return isinstance(found, tuple) and len(found) == 2 and not isinstance(found[1], str | Path | tuple | AdapterChoice)


def _choice(found: object) -> AdapterChoice:
    if isinstance(found, AdapterChoice):
        return found
    if isinstance(found, str):
        return parse_choice(found)
    if isinstance(found, Path):
        return AdapterChoice(found)
    if isinstance(found, tuple) and _is_pair(found) and isinstance(found[0], str | Path):
        return AdapterChoice(Path(found[0]), found[1])
    raise UsageError(f"lora must be paths, or pairs of path and scale, not {found!r:.80}")


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter of an engine: what requests call it, and how much of it is added unless they say otherwise."""

    id: AdapterId
    adapter: Adapter
    scale: float


def free_id(name: str, taken: Mapping[AdapterId, object]) -> AdapterId:
    """The name, or with a number behind it where another adapter has it."""
    candidates = (AdapterId(name if i == 1 else f"{name}-{i}") for i in range(1, len(taken) + 2))
    return next(each for each in candidates if each not in taken)
