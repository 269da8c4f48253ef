"""What a run cost: bytes, seconds, and why the compute thread waited."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pipo.pipeline.expert_stats import ExpertStats


class StallCause(Enum):
    """What the unit that compute waited for was doing meanwhile."""

    QUEUE = "queue"  # its read had not begun: the drive served earlier units
    DISK = "disk"
    REPACK = "repack"
    COPY = "copy"  # to the device


@dataclass(slots=True)
class PassStats:
    """Counters since they were last taken; seconds of the compute thread add up to `wall_s` but for bookkeeping."""

    num_passes: int = 0
    num_tokens: int = 0
    num_reads: int = 0
    bytes_read: int = 0  # weights asked for, without alignment
    bytes_copied: int = 0  # weights, to the device
    compute_s: float = 0.0
    wall_s: float = 0.0
    num_bubbles: int = 0  # times compute had to wait
    experts: ExpertStats | None = None
    stall_s: dict[StallCause, float] = field(default_factory=lambda: dict.fromkeys(StallCause, 0.0))

    def add(self, other: PassStats) -> None:
        """What further passes cost."""
        for name in ("num_passes", "num_tokens", "num_reads", "bytes_read", "bytes_copied", "compute_s", "wall_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.num_bubbles += other.num_bubbles
        for cause, seconds in other.stall_s.items():
            self.stall_s[cause] += seconds
        if other.experts is not None:
            self.experts = self.experts or ExpertStats.of(len(other.experts.blocks))
            for mine, theirs in zip(self.experts.blocks, other.experts.blocks, strict=True):
                mine.add(theirs)

    @property
    def total_stall_s(self) -> float:
        return sum(self.stall_s.values())

    @property
    def stall_share(self) -> float:
        """Of the wall time, 0 to 1."""
        return self.total_stall_s / self.wall_s if self.wall_s else 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_read / self.wall_s if self.wall_s else 0.0
