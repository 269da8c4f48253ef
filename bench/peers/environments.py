"""A virtual environment for each peer, made on first use: no peer is a dependency of pipo, or of another peer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipo.store.library import models_folder

_STAMP = ".installed"
_TAIL = 300  # characters of pip's last words


class NotInstalled(Exception):
    """The packages of a peer cannot be had here."""


def environments_folder() -> Path:
    return models_folder().parent / "peers"


def ensure_python(name: str, packages: Sequence[str], root: Path) -> str:
    """The interpreter of the peer's environment, which is made or brought to these packages. Raises NotInstalled."""
    folder = root / name
    python, stamp = folder / "bin" / "python", folder / _STAMP
    wanted = "\n".join(packages)
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        stamp.unlink(missing_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", *packages])
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise NotInstalled(f"{' '.join(command[-3:])}: {(error.stderr or error.stdout)[-_TAIL:].strip()}") from error
    except OSError as error:
        raise NotInstalled(str(error)) from error
