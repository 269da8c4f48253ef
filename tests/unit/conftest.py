"""Files that drives are measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.units import MIB
from tests.support.transfers import write_random


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_random(path, 1_000_001)
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Large enough to tell of a drive; holds nothing."""
    path = tmp_path / "large.gguf"
    with path.open("wb") as stream:
        stream.truncate(64 * MIB)
    return path
