"""What a number is worth nothing without: the machine, the commit, the date."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipo.base.cores import available_cores
from pipo.base.units import format_size
from pipo.hardware.memory import total_memory_bytes

_ROOT = Path(__file__).resolve().parents[1]
_IDLE_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """`commit` ends in "+" when the working tree differs from it; `load` is the one-minute average at the start."""

    cpu: str
    cores: int
    ram_bytes: int
    system: str
    python: str
    file_system: str
    library: str
    commit: str
    date: str
    load: float

    @property
    def text(self) -> str:
        ram = format_size(self.ram_bytes)
        text = (
            f"{self.cpu}, {self.cores} cores, {ram} RAM, {self.system}, {self.file_system}, Python {self.python}, "
            f"{self.library}\ncommit {self.commit} · {self.date}"
        )
        return text if self.load < _IDLE_LOAD else f"{text} · not idle: load {self.load:.1f}"


def describe_machine(models_folder: Path, library: str) -> Machine:
    return Machine(
        cpu=_cpu_name(),
        cores=available_cores(),
        ram_bytes=total_memory_bytes(),
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        python=platform.python_version(),
        file_system=_file_system(models_folder),
        library=library,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        load=os.getloadavg()[0],
    )


def _cpu_name() -> str:
    """Model name and family: virtual machines often hide the rest."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name, family = facts.get("model name", platform.machine()), facts.get("cpu family")
    return f"{name} (family {family})" if family else name


def _file_system(folder: Path) -> str:
    """Type of the mount that holds the folder."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown file system"
    holding = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(holding, key=lambda pair: len(pair[0]))[1] if holding else "unknown file system"


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()
