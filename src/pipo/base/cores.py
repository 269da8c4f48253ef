"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from pipo.base.cgroups import CGROUPS, PROC, group_folders, read_number, read_words


def available_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Those of its affinity mask, or what the tightest control group lets it use of them, rounded up.

    Threads beyond the group's share wait for each other at every barrier while the kernel holds one of them back.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([mask, *_quotas(proc, cgroups)])


def _quotas(proc: Path, cgroups: Path) -> list[int]:
    """Cores by group, 1 at least. Source: the kernel's admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst."""
    quotas = []
    for version, folder in group_folders("cpu", proc, cgroups):
        if version == 2:
            words = read_words(folder / "cpu.max")
            quota, period = (int(word) if word.isdigit() else None for word in [*words, "", ""][:2])
        else:
            quota, period = (read_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period:
            quotas.append(-(-quota // period))
    return quotas
