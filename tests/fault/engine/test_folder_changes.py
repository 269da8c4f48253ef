"""A Hugging Face folder whose files change under the engine: every shard is watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipo.base.config import EngineConfig
from pipo.base.errors import FileChanged, ReadFailed
from pipo.engine import Engine
from pipo.hardware import host
from pipo.model_file import ModelFile
from tests.support.engines import KNOWN_DRIVE, PLENTY
from tests.support.file_changes import exchange, overwrite, remove
from tests.support.hf_bytes import write_folder, write_sharded
from tests.support.small_engine import SETTINGS, answer, start

SHARDS = [f"model-{idx:05}-of-00003.safetensors" for idx in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "folder")


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("change", [overwrite, exchange, remove])
def test_a_shard_that_changes_between_requests(folder: Path, shard: str, change: Callable[[Path], None]) -> None:
    with start(folder, PLENTY) as engine:
        answer(engine)
        change(folder / shard)
        with pytest.raises(FileChanged) as failed:
            answer(engine)
        assert failed.value.path == str(folder / shard) and failed.value.hint is not None


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("change", [overwrite, exchange, remove])
def test_a_shard_that_changes_between_header_and_start(
    folder: Path, shard: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "drive_rates", lambda files, **_: (KNOWN_DRIVE,))
    with Engine(ModelFile(folder), EngineConfig(ram=str(PLENTY), **SETTINGS)) as engine:
        plan = engine.make_plan()
        change(folder / shard)
        with pytest.raises((FileChanged, ReadFailed), match=shard):
            engine.start(plan)


def test_config_and_tokenizer_were_read_whole(tmp_path: Path) -> None:
    """They may change while the engine answers."""
    folder = write_folder(tmp_path / "folder")
    with start(folder, PLENTY) as engine:
        before = answer(engine)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        assert answer(engine) == before
