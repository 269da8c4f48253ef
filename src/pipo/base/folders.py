"""Where pipo keeps what is its own. Source: the XDG Base Directory Specification, which has relative values ignored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipo.base.errors import UsageError


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/pipo`, else `~/.cache/pipo`; may not exist yet. Raises UsageError without a home."""
    return _own_folder("XDG_CACHE_HOME", ".cache", environment)


def config_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CONFIG_HOME/pipo`, else `~/.config/pipo`; may not exist. Raises UsageError without a home."""
    return _own_folder("XDG_CONFIG_HOME", ".config", environment)


def _own_folder(variable: str, default: str, environment: Mapping[str, str]) -> Path:
    named = Path(environment.get(variable, ""))
    if named.is_absolute():
        return named / "pipo"
    try:
        return Path.home() / default / "pipo"
    except RuntimeError as error:  # no HOME, and the system knows no user of this id
        raise UsageError("this user has no home folder", hint=f"set HOME, or {variable} to a full path") from error
