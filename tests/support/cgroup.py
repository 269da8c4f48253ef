"""A memory control group (version 1) around a child process: page cache is counted in it too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CONTROLLER = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    path: Path

    def run(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command inside the group, with pipes for what it reads and prints."""
        procs = str(self.path / "cgroup.procs")
        wrapped = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]
        return subprocess.Popen(wrapped, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stat(self, name: str) -> int:
        for line in (self.path / "memory.stat").read_text().splitlines():
            key, value = line.split()
            if key == name:
                return int(value)
        raise KeyError(name)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Skips the test where no such group can be made."""
    path = CONTROLLER / f"pipo-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        pytest.skip(f"no cgroup v1 memory controller that can be written: {error}")
    try:
        yield MemoryGroup(path)
    finally:
        _empty(path)
        path.rmdir()


def _empty(path: Path) -> None:
    """Kill what a failed test left running."""
    for _ in range(100):
        pids = (path / "cgroup.procs").read_text().split()
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
