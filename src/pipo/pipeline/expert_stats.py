"""What became of the experts that a run needed, and how good the guesses were."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pipo.planner.residency import UnitId


@dataclass(slots=True)
class BlockStats:
    """Of one block. Each expert that was needed was there (`num_hits`), or its read had been asked for by a guess
    (`num_guessed`), or it had not (`num_missed`).

    `num_foretold` experts were named by the guess, of which `num_right` were needed.
    """

    num_needed: int = 0
    num_guessed: int = 0
    num_missed: int = 0
    num_foretold: int = 0
    num_right: int = 0
    num_needed_after_guess: int = 0  # in visits that a guess was made for

    @property
    def num_hits(self) -> int:
        return self.num_needed - self.num_guessed - self.num_missed

    @property
    def precision(self) -> float | None:
        """Of what was foretold: right. None where nothing was."""
        return self.num_right / self.num_foretold if self.num_foretold else None

    @property
    def recall(self) -> float | None:
        """Of what was needed: foretold."""
        return self.num_right / self.num_needed_after_guess if self.num_needed_after_guess else None

    def add(self, other: BlockStats) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class ExpertStats:
    """`blocks` are those with experts, in order."""

    blocks: list[BlockStats] = field(default_factory=list)

    @classmethod
    def of(cls, num_blocks: int) -> ExpertStats:
        return cls([BlockStats() for _ in range(num_blocks)])

    @property
    def total(self) -> BlockStats:
        total = BlockStats()
        for block in self.blocks:
            total.add(block)
        return total

    @property
    def hit_rate(self) -> float:
        """Of the experts that were needed: in RAM, or asked for in time. 0 to 1."""
        total = self.total
        return 1 - total.num_missed / total.num_needed if total.num_needed else 0.0

    def note(
        self,
        block: int,
        needed: Collection[UnitId],
        missed: Collection[UnitId],
        foretold: Collection[UnitId],
        asked_for: Collection[UnitId],
    ) -> None:
        """A visit of a block; `asked_for` are those of `foretold` that were read for it."""
        wanted, stats = set(needed), self.blocks[block]
        stats.num_needed += len(wanted)
        stats.num_missed += len(missed)
        stats.num_guessed += len(wanted.intersection(asked_for).difference(missed))
        stats.num_foretold += len(foretold)
        stats.num_right += len(wanted.intersection(foretold))
        stats.num_needed_after_guess += len(wanted) if foretold else 0
