"""Machines known by published figures, to predict on without having them.

Made by `python -m bench.paper --profiles` from bench/paper/assumptions.toml, which names the source of every figure.
"""

from __future__ import annotations

from importlib.resources import files

from pipo.base.machine import MachineProfile

NAMES = ("rtx3060-laptop", "rtx5060-laptop", "t4-208gb")


def load(name: str) -> MachineProfile:
    """The profile of that name, one of NAMES. Raises KeyError for another."""
    if name not in NAMES:
        raise KeyError(name)
    return MachineProfile.from_json(files(__name__).joinpath(f"{name}.json").read_bytes())
