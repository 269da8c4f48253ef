"""For every test of transfer.disk: a file, a deadline, and no reader that outlives its transfer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipo.transfer import files
from tests.support.disk_units import FILE_BYTES
from tests.support.transfers import assert_threads_end, deadline, write_random


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with deadline(15):
        yield


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert_threads_end("pipo read", within_s=0.5)


@pytest.fixture(autouse=True)
def no_drive_was_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_DRIVES_TOLD_OF", set())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture
def content(path: Path) -> bytes:
    return write_random(path, FILE_BYTES)
