"""The most anonymous memory a child process ever has, seen from outside: the kernel keeps no such peak itself."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from pipo.base.units import KIB

_SAMPLE_S = 0.005


class AnonymousPeak:
    """Watches a process from a thread while the block lasts.

    Costs half a percent of a core: for timed work, look less often.
    """

    def __init__(self, pid: int, every_s: float = _SAMPLE_S) -> None:
        self.peak_bytes = 0
        self._path = Path(f"/proc/{pid}/status")
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="anonymous peak", daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.peak_bytes = max(self.peak_bytes, _anonymous_bytes(self._path))
            except OSError:  # it ended, or there is no /proc
                return


def anonymous_bytes(pid: int) -> int:
    """Of a process and all that it started, now; those that end meanwhile count nothing."""
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    total = 0
    for each in family:
        with suppress(OSError):
            total += _anonymous_bytes(Path(f"/proc/{each}/status"))
    return total


def _anonymous_bytes(status: Path) -> int:
    lines = status.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))) * KIB
