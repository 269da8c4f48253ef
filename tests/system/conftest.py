"""The command line that system tests drive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import CommandLine


@pytest.fixture(scope="session")
def pipo(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """One environment for all: its drive is measured once."""
    return CommandLine.in_folder(tmp_path_factory.mktemp("pipo"), smollm2_path.resolve())
