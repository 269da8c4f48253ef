"""What was measured, kept between runs in `$XDG_CACHE_HOME/pipo`: rates of drives, profiles of machines."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipo.base.cores import available_cores
from pipo.base.errors import MalformedProfile
from pipo.base.folders import cache_folder
from pipo.base.machine import MachineProfile
from pipo.base.strict_json import decode
from pipo.base.tensor_type import TensorType
from pipo.base.units import GIB, MIB
from pipo.compute.devices import cpu_features
from pipo.compute.ggml import Library
from pipo.hardware.drive import DriveRate, measure_drive
from pipo.hardware.memory import machine_name, physical_memory_bytes
from pipo.transfer.files import ALIGNMENT

log = logging.getLogger(__name__)

LEAST_TELLING_BYTES = 64 * MIB  # the least that QUICK_COMBOS keep in flight, twice

Measure = Callable[[Sequence[Path]], tuple[DriveRate, ...]]
Probe = Callable[[Sequence[TensorType]], MachineProfile]  # of these types


def cache_file(environment: Mapping[str, str] = os.environ) -> Path:
    return cache_folder(environment) / "drives.json"


def profile_file(environment: Mapping[str, str] = os.environ) -> Path:
    return cache_folder(environment) / "machine.json"


def drive_rates(
    files: Sequence[Path], *, file: Path | None = None, measure: Measure = measure_drive, kind: str = ""
) -> tuple[DriveRate, ...]:
    """Rates of the drive that holds `files`: those of an earlier run, else measured now and kept.

    `kind` tells apart what was measured, where a small budget could not afford every combination.

    What files of less than LEAST_TELLING_BYTES give is used, not kept: it tells of the latency of a read.
    A cache that is broken or cannot be written costs a measurement and a line in the log, never the run.
    Raises TransferError.
    """
    file = file or cache_file()
    key = drive_key(files[0]) + kind
    entries = _load(file)
    if (known := _parse(entries.get(key), file, key)) is not None:
        return known
    rates = measure(files)
    if not tells_of_a_drive(files):
        return rates
    _save(file, {**entries, key: [asdict(rate) for rate in rates]})
    return rates


@dataclass(frozen=True, slots=True)
class KnownProfile:
    """A profile, and whether it was measured just now. `why` it was: a sentence, "" where it was not."""

    profile: MachineProfile
    why: str

    @property
    def is_new(self) -> bool:
        return bool(self.why)


def known_profile(
    files: Sequence[Path],
    lib: Library,
    num_threads: int,
    types: Sequence[TensorType],
    probe: Probe,
    *,
    kind: str = "",
    fresh: bool = False,
    file: Path | None = None,
) -> KnownProfile:
    """The profile of this machine, these threads, this libggml and the drive that holds `files`, with these types at
    least: that of an earlier run, else measured now and kept.

    `kind` tells apart what was measured: with another device, or with less memory than a probe wants. `fresh` measures
    in any case. What belongs to another machine is left where it is; what cannot be used costs a
    measurement and a line in the log, never the run. Files too small to tell of a drive: see `drive_rates`.
    Raises what `probe` raises.
    """
    file = file or profile_file()
    key = profile_key(files[0], lib, num_threads) + kind
    entries = _load(file)
    known = _parse_profile(entries.get(key), file)
    have = [TensorType[name] for name in known.cpu.products] if known is not None else []
    missing = [type_ for type_ in types if type_ not in have]
    if known is not None and not missing and not fresh:
        return KnownProfile(known, "")
    profile = probe([*have, *missing] if not fresh else types)
    if tells_of_a_drive(files):
        _save(file, {**entries, key: asdict(profile)})
    return KnownProfile(profile, _why(fresh, bool(entries), key in entries, known, missing))


def kept_profile(
    files: Sequence[Path], lib: Library, num_threads: int, *, kind: str = "", file: Path | None = None
) -> MachineProfile | None:
    """Of this machine, these threads, this libggml and this drive, from an earlier run. Measures nothing."""
    file = file or profile_file()
    return _parse_profile(_load(file).get(profile_key(files[0], lib, num_threads) + kind), file)


def _why(fresh: bool, has_others: bool, has_entry: bool, known: MachineProfile | None, missing: object) -> str:
    if fresh:
        return "a fresh measurement was asked for"
    if known is not None and missing:
        return "the last measurement lacks a type of this model"
    if has_entry:
        return "the last measurement cannot be used"
    return "what is kept is of another machine, drive or libggml" if has_others else "nothing was measured before"


def profile_key(path: Path, lib: Library, num_threads: int) -> str:
    """Names all that the figures depend on."""
    memory_gib = round(physical_memory_bytes() / GIB)
    machine = f"{machine_name()}, {available_cores()} cores, {num_threads} threads, {memory_gib} GiB"
    library = f"libggml {lib.version_text} of {lib.provider.name} with {' '.join(cpu_features(lib))}"
    return f"{machine}; drive {drive_key(path)}; {library}"


def _parse_profile(entry: object, file: Path) -> MachineProfile | None:
    if entry is None:
        return None
    try:
        return decode(MachineProfile, entry)
    except MalformedProfile as error:
        log.warning("cache=%s action=measure reason=%s", file, error.message)
        return None


def tells_of_a_drive(files: Sequence[Path]) -> bool:
    """Files smaller than this tell of the latency of a read."""
    return sum(path.stat().st_size for path in files) >= LEAST_TELLING_BYTES


def drive_key(path: Path) -> str:
    """Names the file system under a path and the version of pipo, whose code the rates belong to."""
    return f"{path.stat().st_dev}:{os.statvfs(path).f_fsid:x}:pipo-{_pipo_version()}"


def _pipo_version() -> str:
    try:
        return version("pipo")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _load(file: Path) -> dict[str, object]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("cache=%s action=measure reason=%s", file, error)
        return {}
    if not isinstance(entries, dict):
        log.warning("cache=%s action=measure reason=not a table", file)
        return {}
    return entries


def _parse(entry: object, file: Path, key: str) -> tuple[DriveRate, ...] | None:
    if entry is None:
        return None
    try:
        return _checked(entry)
    except (TypeError, ValueError) as error:
        log.warning("cache=%s drive=%s action=measure reason=%s", file, key, error)
        return None


def _checked(entry: object) -> tuple[DriveRate, ...]:
    """Raises TypeError, ValueError."""
    if not isinstance(entry, list) or not entry:
        raise ValueError("wanted a list of rates")
    rates = tuple(DriveRate(**fields) for fields in entry)
    for rate in rates:
        if not _is_usable(rate):
            raise ValueError(f"unusable {rate}")
    return rates


def _is_usable(rate: DriveRate) -> bool:
    """Types too: the numbers come from a file."""
    counts, speed = (rate.chunk_bytes, rate.num_workers), rate.bytes_per_s
    if not all(type(count) is int and count > 0 for count in counts) or not isinstance(rate.direct, bool):
        return False
    return isinstance(speed, float) and 0 < speed < math.inf and rate.chunk_bytes % ALIGNMENT == 0


def _save(file: Path, entries: Mapping[str, object]) -> None:
    """Whole or not at all: written aside, then renamed."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        log.warning("cache=%s action=keep nothing reason=%s", file, error)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
