"""An engine that cannot be made leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo import engine as engine_module
from pipo.base.config import EngineConfig
from pipo.base.errors import ReadFailed, UsageError
from pipo.compute.devices import CpuBackend
from pipo.compute.repack import RepackBuffer
from pipo.engine import Engine
from pipo.hardware import host
from pipo.model_file import ModelFile


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[CpuBackend]:
    """The backends that were closed."""
    found: list[CpuBackend] = []
    close = CpuBackend.close

    def record(backend: CpuBackend) -> None:
        found.append(backend)
        close(backend)

    monkeypatch.setattr(CpuBackend, "close", record)
    return found


def test_a_budget_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "compute_on_cpu", lambda *_: pytest.fail("a backend was made"))
    with pytest.raises(UsageError, match="--ram"):
        Engine(ModelFile(path), EngineConfig(ram="much"))


def test_kernels_that_are_not_laid_out_as_expected(
    path: Path, closed: list[CpuBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(lib: object) -> None:
        raise MemoryError

    monkeypatch.setattr(RepackBuffer, "find", fail)
    with pytest.raises(MemoryError):
        Engine(ModelFile(path), EngineConfig(ram="1GB"))
    assert len(closed) == 1


def test_a_drive_that_cannot_be_measured(path: Path, closed: list[CpuBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ReadFailed("no", path=str(path), offset=0, wanted_bytes=1, got_bytes=0)

    monkeypatch.setattr(host, "drive_rates", fail)
    with Engine(ModelFile(path), EngineConfig(ram="1GB")) as engine, pytest.raises(ReadFailed):
        engine.make_plan()
    assert len(closed) == 1
