"""A control group with a memory limit, for one child process. Wants root, and the memory controller."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipo.base.units import MIB

CGROUPS = Path("/sys/fs/cgroup")
_SLACK_SHARE = 0.05
_SLACK_BYTES = 48 * MIB
_REMOVE_S = 2.0  # the kernel needs a moment to forget a process that ended


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A group of version 1 or 2. Everything its processes touch first is charged to it, page cache included."""

    folder: Path
    is_v2: bool
    limit_bytes: int

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command, run inside. It joins before it starts: what was charged elsewhere before would stay there."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def cache_bytes(self) -> int:
        """Page cache: of every file, the program's own too."""
        return _stat(self.folder / "memory.stat").get("file" if self.is_v2 else "total_cache", 0)

    @property
    def peak_bytes(self) -> int:
        """The most that was ever charged, page cache included; 0 where the kernel keeps no such peak."""
        path = self.folder / ("memory.peak" if self.is_v2 else "memory.max_usage_in_bytes")
        return int(path.read_text()) if path.exists() else 0

    @property
    def num_kills(self) -> int:
        """Processes ended for want of memory."""
        name = "memory.events" if self.is_v2 else "memory.oom_control"
        return _stat(self.folder / name).get("oom_kill", 0)

    @property
    def num_reclaims(self) -> int:
        """How often the limit was hit: page cache had to go before the process could go on."""
        if self.is_v2:
            return _stat(self.folder / "memory.events").get("max", 0)
        return int((self.folder / "memory.failcnt").read_text())


def limit_around(ram_bytes: int) -> int:
    """The limit a budget must live in: what no budget counts (code pages, page tables, kernel) comes on top."""
    return ram_bytes + max(int(ram_bytes * _SLACK_SHARE), _SLACK_BYTES)


def reason_against(root: Path = CGROUPS) -> str | None:
    """Why there can be no limit here; None when there can."""
    parent = _parent(root)
    if parent is None:
        return "no memory controller of cgroups"
    if not os.access(parent, os.W_OK):
        return "cgroups want root"
    return None


@contextmanager
def memory_limit(name: str, limit_bytes: int, root: Path = CGROUPS) -> Iterator[Cgroup]:
    """A group that lives as long as the block. Its processes must have ended by then."""
    parent = _parent(root)
    assert parent is not None, "ask reason_against first"
    is_v2 = parent == root
    folder = parent / f"pipo-bench-{os.getpid()}-{name}"
    folder.mkdir()
    try:
        (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        yield Cgroup(folder, is_v2, limit_bytes)
    finally:
        _remove(folder)


def _parent(root: Path) -> Path | None:
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return root / "memory"
    controllers = root / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return root
    return None


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _REMOVE_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
