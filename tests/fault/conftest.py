"""A hub that tests may spoil."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_repos import make_repos
from tests.support.hub_server import Hub, running


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With a cache of its own, and nobody waits between tries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with running(Hub(make_repos())) as hub:
        hub.set_up(monkeypatch, tmp_path / "hf")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield hub
