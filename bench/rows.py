"""One line of a result: a metric of one subject, its samples summed up, and the target it has to meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Summary:
    median: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Summary:
        values = sorted(samples)
        assert values, "no samples"
        return cls(median(values), values[0], values[-1], len(values))


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that the median has to keep."""

    bound: float
    is_upper: bool

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.is_upper else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.is_upper else '≥'} {self.bound:.4g}"


def at_most(bound: float) -> Target:
    return Target(bound, is_upper=True)


def at_least(bound: float) -> Target:
    return Target(bound, is_upper=False)


@dataclass(frozen=True, slots=True)
class Row:
    """`unit` is s, GB/s, tok/s, MiB, % or × (a ratio). Without a summary the note says why nothing was measured."""

    metric: str
    subject: str
    unit: str
    summary: Summary | None
    target: Target | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """None where there is nothing to meet, or nothing was measured."""
        if self.target is None or self.summary is None:
            return None
        return self.target.is_met(self.summary.median)


def row(
    metric: str, subject: str, unit: str, samples: Iterable[float], target: Target | None = None, note: str = ""
) -> Row:
    return Row(metric, subject, unit, Summary.of(samples), target, note)


def skipped(metric: str, subject: str, reason: str) -> Row:
    return Row(metric, subject, "", None, note=reason)
