"""The whole engine when the model file changes under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipo.base.config import EngineConfig
from pipo.base.errors import FileChanged, PipoError, ReadFailed, UnexpectedEof
from pipo.engine import Engine
from pipo.hardware import host
from pipo.model_file import ModelFile
from tests.support.engines import KNOWN_DRIVE, PLENTY
from tests.support.file_changes import cut, exchange, overwrite, remove
from tests.support.small_engine import LONG, PROMPT, SETTINGS, answer, start


@pytest.mark.parametrize("change", [cut, overwrite, exchange, remove])
def test_file_that_changes_between_requests(path: Path, ram_bytes: int, change: Callable[[Path], None]) -> None:
    with start(path, ram_bytes) as engine:
        answer(engine)
        change(path)
        for _ in range(2):
            with pytest.raises(FileChanged) as failed:
                answer(engine)
            assert failed.value.path == str(path) and failed.value.hint is not None


@pytest.mark.parametrize("change", [cut, exchange])
def test_file_that_changes_during_an_answer(path: Path, ram_bytes: int, change: Callable[[Path], None]) -> None:
    # a read that is under way when the file is cut meets its end first
    with start(path, ram_bytes) as engine, pytest.raises((FileChanged, UnexpectedEof)):
        for i, _ in enumerate(engine.stream(PROMPT, LONG)):
            if i == 1:
                change(path)


def test_file_that_is_cut_before_the_start(path: Path, smallest: int) -> None:
    """The header was read; then somebody truncates the file."""
    engine = start(path, smallest)
    with engine:
        plan = engine.plan
    assert plan is not None
    cut(path)
    with pytest.raises(PipoError, match=r"model\.gguf"):
        start(path, smallest)


@pytest.mark.parametrize("change", [overwrite, exchange, remove])
def test_file_that_changes_between_header_and_start(
    path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one version under the hyper-parameters of another would run, and wrongly."""
    monkeypatch.setattr(host, "drive_rates", lambda files, **_: (KNOWN_DRIVE,))
    model = ModelFile(path)
    with Engine(model, EngineConfig(ram=str(PLENTY), **SETTINGS)) as engine:
        plan = engine.make_plan()
        change(path)
        with pytest.raises((FileChanged, ReadFailed), match=r"model\.gguf"):
            engine.start(plan)
