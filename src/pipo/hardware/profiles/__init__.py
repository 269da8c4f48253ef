"""Machines known by published figures, to predict on without having them.

Made by `python -m bench.paper --profiles` from bench/paper/assumptions.toml, which names the source of every figure.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pipo.base.errors import MalformedProfile, UsageError
from pipo.base.machine import MachineProfile
from pipo.base.strict_json import decode, parse
from pipo.base.units import MIB, format_size

NAMES = ("rtx3060-laptop", "rtx5060-laptop", "t4-208gb")
MAX_FILE_BYTES = 4 * MIB  # a profile of many types and drive ways has 20 KiB


def load(name: str) -> MachineProfile:
    """The profile of that name, one of NAMES. Raises KeyError for another."""
    if name not in NAMES:
        raise KeyError(name)
    return MachineProfile.from_json(files(__name__).joinpath(f"{name}.json").read_bytes())


def find(name_or_file: str) -> MachineProfile:
    """One of NAMES, or a file: a profile, or what `pipo doctor --probe --json` printed on the machine.

    Raises UsageError where there is neither, MalformedProfile naming the file and the key.
    """
    if name_or_file in NAMES:
        return load(name_or_file)
    path = Path(name_or_file)
    try:
        return _parsed(_read(path))
    except MalformedProfile as error:
        raise error.in_file(path) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        names = ", ".join(NAMES)
        what = "no such machine or file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UsageError(
            f"--machine {str(path)!r:.200}: {what}", hint=f"machines that come with pipo: {names}"
        ) from error
    if len(text) > MAX_FILE_BYTES:
        raise UsageError(f"--machine {path}: is no profile, it has more than {format_size(MAX_FILE_BYTES)}")
    return text


def _parsed(text: bytes) -> MachineProfile:
    found = parse(text)
    if isinstance(found, dict) and isinstance(found.get("profile"), dict):
        found = {key: value for key, value in found["profile"].items() if key != "measured_now_because"}
    return decode(MachineProfile, found)
