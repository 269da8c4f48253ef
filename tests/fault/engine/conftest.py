"""For every test of a failing engine: models and their smallest budget, a deadline, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.random_model import write_random_model
from pipo.pipeline import assembly
from pipo.tiers.ledger import Ledger
from tests.support.engines import PLENTY, smallest_ram_bytes
from tests.support.small_engine import SETTINGS, answer, start
from tests.support.transfers import assert_threads_end, deadline


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with deadline(30):
        yield


@pytest.fixture(autouse=True)
def ledgers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ledger]]:
    """Of every engine of the test, which has closed them all: nothing is charged, nobody works any more."""
    made: list[Ledger] = []

    class Noted(Ledger):
        def __init__(self, limit_bytes: int) -> None:
            super().__init__(limit_bytes)
            made.append(self)

    monkeypatch.setattr(assembly, "Ledger", Noted)
    yield made
    assert [ledger.breakdown() for ledger in made] == [{}] * len(made)
    assert_threads_end("pipo read", "compute", within_s=1.0)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB in Q4_0; engines repack it where the CPU has kernels."""
    path = tmp_path_factory.mktemp("model") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    return path


@pytest.fixture(scope="session")
def smallest(original: Path) -> int:
    return smallest_ram_bytes(original, **SETTINGS)


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(original.read_bytes())
    return copy


@pytest.fixture(params=["streamed", "resident"])
def ram_bytes(request: pytest.FixtureRequest, smallest: int) -> int:
    return smallest if request.param == "streamed" else PLENTY


@pytest.fixture(scope="session")
def healthy(original: Path, smallest: int) -> tuple[int, ...]:
    with start(original, smallest) as engine:
        return answer(engine)
