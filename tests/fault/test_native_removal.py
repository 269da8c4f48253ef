"""`pipo rm` takes a model's weights in another layout with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.store.library import models_folder
from pipo.store.removal import plan_removal


def test_the_native_file_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = models_folder()
    folder.mkdir(parents=True)
    for name in ("mine.gguf", "mine.gguf.native", "yours.gguf.native"):
        (folder / name).write_bytes(bytes(10))
    removal = plan_removal("mine")
    assert removal.num_bytes == 20
    removal.run()
    assert [path.name for path in folder.glob("*.gguf*")] == ["yours.gguf.native"]
