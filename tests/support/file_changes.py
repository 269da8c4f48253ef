"""What may happen to a model file while it is open."""

from __future__ import annotations

import os
from pathlib import Path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"new")
    os.utime(path, ns=(1, 1))


def exchange(path: Path) -> None:
    """Another file of the same bytes under the same name."""
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def remove(path: Path) -> None:
    path.unlink()
