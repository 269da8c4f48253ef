"""The machine that a plan is for: this one, whose limits are asked for and whose drive is measured, or another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from pipo.base.config import EngineConfig
from pipo.base.machine import LinkProfile
from pipo.base.units import MIB
from pipo.hardware.budget import ram_bytes, vram_bytes
from pipo.hardware.cache import drive_rates
from pipo.hardware.drive import QUICK_COMBOS, DriveRate, best_rate, measure_drive

WIDE_SHARE = 16  # the transfer's own buffers may take this fraction of the budget
_TYPICAL_CHUNK_BYTES, _TYPICAL_WORKERS = 4 * MIB, 8  # where a profile does not say how its drive was read


class Host(Protocol):
    """What the memory and the drive of a machine allow. `process_bytes` is what the process that runs the model would
    take there before it has any of it; None where it is this process.
    """

    @property
    def process_bytes(self) -> int | None: ...

    def ram_bytes(self) -> int:
        """The limit of the whole process. Raises UsageError."""

    def vram_bytes(self, free_bytes: int) -> int:
        """Of a device with so much free. Raises UsageError."""

    def drive_rate(self, files: Sequence[Path]) -> DriveRate:
        """Of the drive that holds the files. Raises TransferError."""


class ThisHost:
    """The machine this runs on. The drive is measured at first use, and once."""

    process_bytes = None

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._drive: DriveRate | None = None

    def ram_bytes(self) -> int:
        return ram_bytes(self._config.ram)

    def vram_bytes(self, free_bytes: int) -> int:
        return vram_bytes(self._config.vram, free_bytes)

    def drive_rate(self, files: Sequence[Path]) -> DriveRate:
        if self._drive is None:
            self._drive = _measured_rate(files, self.ram_bytes())
        return self._drive


@dataclass(frozen=True, slots=True)
class GivenHost:
    """A machine of which all is known. Nothing of this one is measured, or limits it."""

    ram_limit_bytes: int
    vram_limit_bytes: int
    drive: DriveRate
    process_bytes: int

    def ram_bytes(self) -> int:
        return self.ram_limit_bytes

    def vram_bytes(self, free_bytes: int) -> int:
        return self.vram_limit_bytes

    def drive_rate(self, files: Sequence[Path]) -> DriveRate:
        return self.drive


def rate_of_profile(drive: LinkProfile) -> DriveRate:
    """As a profile tells it; requests of 4 MiB, 8 in flight, where it does not say."""
    chunk_bytes, depth = drive.chunk_bytes or _TYPICAL_CHUNK_BYTES, drive.depth or _TYPICAL_WORKERS
    return DriveRate(chunk_bytes, depth, drive.bytes_per_s, direct=True)


def _measured_rate(files: Sequence[Path], limit_bytes: int) -> DriveRate:
    """The best way to read this drive, measured at first use with buffers that are small beside the budget."""
    affordable = [c for c in QUICK_COMBOS if 2 * c.chunk_bytes * c.num_workers * WIDE_SHARE <= limit_bytes]
    combos = affordable or QUICK_COMBOS[:1]
    kind = "" if len(combos) == len(QUICK_COMBOS) else f":first-{len(combos)}"
    return best_rate(drive_rates(files, measure=partial(measure_drive, combos=combos), kind=kind))
