"""The control groups around this process: who else, besides the machine, limits its memory and its cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def group_folders(controller: str, proc: Path = PROC, root: Path = CGROUPS) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of every group that may limit `controller`, innermost first; some may not exist."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hybrid = root / "unified"
            yield from ((2, folder) for folder in _upwards(hybrid if hybrid.is_dir() else root, path))
        elif controller in controllers.split(","):
            mount = root / controller
            yield from ((1, folder) for folder in _upwards(mount if mount.is_dir() else root / controllers, path))


def read_words(path: Path) -> list[str]:
    """What a file of the group says; empty where there is none."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def read_number(path: Path) -> int | None:
    """None where there is no such file, or it says "max" or -1: no limit."""
    words = read_words(path)
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Every group from `path` up. Inside a container the path may be the host's: then only the mount itself exists."""
    folder = mount / path.strip("/")
    for each in [folder, *folder.parents]:
        yield each
        if each == mount:
            return
