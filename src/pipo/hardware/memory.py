"""What machine this is, how much memory it has, how much of it may be used, and how much this process has taken."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipo.base.cgroups import CGROUPS, PROC, group_folders, read_number
from pipo.base.units import GIB, KIB

_LEFT_FREE_BYTES = GIB  # for the rest of the machine, or a tenth of what is free where that is more
_NO_LIMIT_BYTES = 1 << 60  # version 1 says "none" as a number near 2^63


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """`anonymous_bytes` is what a budget limits: private memory, in RAM or swapped out, without file pages."""

    anonymous_bytes: int
    resident_bytes: int
    peak_resident_bytes: int


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """`limit_bytes` can be taken on top of what is in use now. `source` says what limits it."""

    limit_bytes: int
    source: str


class PeakSampler:
    """The largest anonymous memory seen so far. Samples when asked and keeps no thread."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self.peak_bytes = 0

    def sample(self) -> int:
        """Anonymous bytes now. Cost: about 20 µs."""
        now_bytes = process_memory(self._proc).anonymous_bytes
        self.peak_bytes = max(self.peak_bytes, now_bytes)
        return now_bytes


def process_memory(proc: Path = PROC) -> ProcessMemory:
    """Memory of this process. Without /proc the peak stands for all three: the kernel tells no more."""
    try:
        status = _read_kilobytes(proc / "self" / "status")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIB)
        return ProcessMemory(peak, peak, peak)
    anonymous = status.get("RssAnon", status.get("VmRSS", 0)) + status.get("VmSwap", 0)
    return ProcessMemory(anonymous, status.get("VmRSS", 0), status.get("VmHWM", 0))


def tree_anonymous_bytes(proc: Path = PROC) -> int:
    """Anonymous memory of this process and of all that it has started, and they. Without /proc: of this one alone."""
    total, todo = 0, ["self"]
    while todo:
        process = proc / todo.pop()
        with contextlib.suppress(OSError):  # it has ended meanwhile
            status = _read_kilobytes(process / "status")
            total += status.get("RssAnon", 0) + status.get("VmSwap", 0)
            for task in (process / "task").iterdir():
                todo += (task / "children").read_text().split()
    return total or process_memory(proc).anonymous_bytes


def release_free_memory() -> None:
    """Give back what the allocator keeps after large objects died: 4 MiB after a tokenizer of 49k tokens was built,
    40 MiB after one of 260k. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def total_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """RAM of the machine, or the limit of the tightest control group around this process."""
    limits = [group.limit_bytes for group in _cgroups(proc, cgroups)]
    return min([_machine_bytes(proc, "MemTotal"), *limits])


def machine_name(proc: Path = PROC) -> str:
    """The processor as the kernel names it."""
    try:
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"


def physical_memory_bytes() -> int:
    """RAM of the machine, whatever part of it a control group leaves to this process."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> AvailableMemory:
    """What can be taken without swapping or being killed. Page cache counts as free: the kernel takes it back."""
    found = [AvailableMemory(_machine_bytes(proc, "MemAvailable"), "free memory of the machine")]
    found += [AvailableMemory(group.free_bytes, f"control group {group.path}") for group in _cgroups(proc, cgroups)]
    return min(found, key=lambda each: each.limit_bytes)


def auto_budget_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """What `--ram auto` takes: all that is available but 1 GiB, or but a tenth where that is more. 0 at least."""
    available = available_memory(proc, cgroups).limit_bytes
    return max(available - max(_LEFT_FREE_BYTES, available // 10), 0)


@dataclass(frozen=True, slots=True)
class _Cgroup:
    path: Path
    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(self.limit_bytes - self.used_bytes + self.reclaimable_bytes, 0)


def _cgroups(proc: Path, root: Path) -> Iterator[_Cgroup]:
    """The control groups with a memory limit that hold this process, innermost first."""
    for version, folder in group_folders("memory", proc, root):
        group = _read_v2(folder) if version == 2 else _read_v1(folder)
        if group is not None and group.limit_bytes < _NO_LIMIT_BYTES:
            yield group


def _read_v2(folder: Path) -> _Cgroup | None:
    """Source: Documentation/admin-guide/cgroup-v2.rst. `memory.high` throttles, so it limits as well."""
    limits = [read_number(folder / name) for name in ("memory.max", "memory.high")]
    used = read_number(folder / "memory.current")
    known = [limit for limit in limits if limit is not None]
    if not known or used is None:
        return None
    stat = _read_stat(folder / "memory.stat")
    return _Cgroup(folder, min(known), used, stat.get("active_file", 0) + stat.get("inactive_file", 0))


def _read_v1(folder: Path) -> _Cgroup | None:
    """Source: Documentation/admin-guide/cgroup-v1/memory.rst."""
    limit, used = (read_number(folder / f"memory.{name}_in_bytes") for name in ("limit", "usage"))
    if limit is None or used is None:
        return None
    stat = _read_stat(folder / "memory.stat")
    return _Cgroup(folder, limit, used, stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0))


def _read_stat(path: Path) -> dict[str, int]:
    """The lines of a memory.stat that say `name 123`."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {name: int(value) for name, value in (pair for pair in words if len(pair) == 2)}


def _machine_bytes(proc: Path, name: str) -> int:
    try:
        return _read_kilobytes(proc / "meminfo")[name]
    except (OSError, KeyError):
        # no /proc: physical pages are all that POSIX offers, free or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_kilobytes(path: Path) -> dict[str, int]:
    """The lines of a /proc file that say `Name:   123 kB`, in bytes."""
    sizes = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            sizes[name] = int(words[0]) * KIB
    return sizes
