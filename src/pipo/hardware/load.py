"""How much of the cores other programs take, which a measurement should say."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipo.base.cgroups import PROC

_IDLE = (3, 4)  # columns of /proc/stat: idle and waiting for a drive. Source: proc_stat(5)


class OtherLoad:
    """The share of the machine's cores that other programs take from when this was made. Zero where the kernel does
    not tell.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._begin = self._read()

    def share(self) -> float:
        """0 to 1."""
        begin, now = self._begin, self._read()
        if begin is None or now is None or now[1] <= begin[1]:
            return 0.0
        busy_s, whole_s, own_s = (b - a for a, b in zip(begin, now, strict=True))
        return min(max((busy_s - own_s) / whole_s, 0.0), 1.0)

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds of all cores: busy, altogether, and what this process computed."""
        try:
            words = (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:9]
            ticks = [int(word) for word in words]
        except (OSError, ValueError):
            return None
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        idle = sum(ticks[i] for i in _IDLE if i < len(ticks))
        return (sum(ticks) - idle) * tick_s, sum(ticks) * tick_s, time.process_time()
