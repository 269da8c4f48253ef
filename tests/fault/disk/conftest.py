"""For every test of transfer.disk: a file, a deadline, and no reader that outlives its transfer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk_units import FILE_BYTES
from tests.support.transfers import deadline, write_random


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with deadline(15):
        yield


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    for thread in [t for t in threading.enumerate() if t.name.startswith("pipo read")]:
        thread.join(0.5)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture
def content(path: Path) -> bytes:
    return write_random(path, FILE_BYTES)
