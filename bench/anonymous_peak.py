"""The most anonymous memory a child process ever has, seen from outside: the kernel keeps no such peak itself."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

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
                lines = self._path.read_text().splitlines()
            except OSError:  # it ended, or there is no /proc
                return
            sizes = (int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
            self.peak_bytes = max(self.peak_bytes, sum(sizes) * KIB)
