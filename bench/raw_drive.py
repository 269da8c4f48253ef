"""The raw read rate that everything is held against: the best way to read the same bytes, with nothing else running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.child import Child
from bench.messages import ReadDrive
from bench.rows import Row, row
from pipo.base.manifest import Extent
from pipo.base.units import MIB
from pipo.hardware.drive import DriveRate
from pipo.transfer.disk import DriveSettings

_NUM_KEPT = 3  # ways to read that are sampled again between rounds
_SHORT_SHARE = 12  # of the time for all ways


@dataclass(frozen=True, slots=True)
class Sample:
    """When it was taken ("before", "between", "after"), and the best that was found."""

    when: str
    best: DriveRate


class RawDrive:
    """Samples in a child process, which reads through pipo's transfer into slots like an engine's."""

    def __init__(
        self,
        child: Child,
        path: Path,
        extents: Sequence[Extent],
        combos: tuple[DriveSettings, ...],
        seconds: float,
    ) -> None:
        self._child = child
        self._path = path
        self._extents = tuple(extents)
        self._seconds = seconds
        self._combos = combos
        self._kept = combos
        self.samples: list[Sample] = []
        self.last_rates: tuple[DriveRate, ...] = ()

    def sweep(self, when: str) -> None:
        """Every way to read; the best ones are what `sample` tries from now on."""
        rates = self._take(when, self._combos, self._seconds)
        best_first = sorted(rates, key=lambda rate: -rate.bytes_per_s)
        self._kept = tuple(_asked(rate) for rate in best_first[:_NUM_KEPT])

    def sample(self, when: str) -> None:
        self._take(when, self._kept, self._seconds / _SHORT_SHARE)

    @property
    def bytes_per_s(self) -> float:
        """The median over the run of the best way at each time."""
        return median(sample.best.bytes_per_s for sample in self.samples)

    def rows(self) -> list[Row]:
        rates = [sample.best.bytes_per_s / 1e9 for sample in self.samples]
        by_time = " · ".join(f"{sample.when} {sample.best.bytes_per_s / 1e9:.2f}" for sample in self.samples)
        best = max(self.samples, key=lambda sample: sample.best.bytes_per_s).best
        how = "" if best.direct else ", through the page cache: no O_DIRECT here"
        note = f"best {best.chunk_bytes // MIB} MiB × {best.num_workers}{how}; {by_time}"
        return [row("raw read rate", "drive", "GB/s", rates, note=note)]

    def _take(self, when: str, combos: tuple[DriveSettings, ...], seconds: float) -> tuple[DriveRate, ...]:
        rates = self._child.ask(ReadDrive((self._path,), self._extents, combos, seconds))
        self.last_rates = rates
        self.samples.append(Sample(when, max(rates, key=lambda rate: rate.bytes_per_s)))
        return rates


def _asked(rate: DriveRate) -> DriveSettings:
    return DriveSettings(rate.chunk_bytes, rate.num_workers)
