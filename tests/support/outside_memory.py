"""The anonymous memory of another process, looked at from outside."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

_SAMPLE_S = 0.002


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """The most that it ever has, swapped or not, until it ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(_SAMPLE_S)
    return peak


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(sizes.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
