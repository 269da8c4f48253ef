"""Adapters from strangers: whatever their bytes and settings are, a parse or a PipoError, soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.base.errors import PipoError
from pipo.formats.adapter import open_adapter
from pipo.formats.checkpoint import open_checkpoint
from pipo.models.adapters import check_adapter, corrections_of
from pipo.models.registry import stages_of
from tests.support.tiny_adapters import ATTENTION, TinyAdapter, write_gguf_adapter, write_peft
from tests.support.tiny_models import SPECS, make_model, write_gguf

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "bias", "peft_type",
     "init_lora_weights", "modules_to_save", "use_dora", "layer_replication", "q_proj"]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("hostile"), make_model(SPECS["llama"])
    adapter = TinyAdapter(targets=ATTENTION, rank=2)
    write_gguf(model, folder / "model.gguf")
    write_gguf_adapter(model, adapter, folder / "good.gguf")
    write_peft(model, adapter, folder / "good")
    (folder / "bad").mkdir()
    return folder


def take(path: Path, folder: Path) -> bool:
    """Whether it is an adapter of the model. Nothing but a PipoError may come of one that is not."""
    manifest = open_checkpoint(folder / "model.gguf").manifest
    stages = stages_of(manifest)
    try:
        adapter = open_adapter(path)
        check_adapter(adapter, manifest, stages)
    except PipoError as error:
        assert len(str(error)) < 2000
        return False
    assert sum(len(corrections_of([adapter])(stage)) for stage in stages) == len(adapter.parts)
    return True


def test_the_good_ones_are_taken(folder: Path) -> None:
    assert take(folder / "good.gguf", folder) and take(folder / "good", folder)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(KEYS | st.text(max_size=12), JSON, max_size=3))
def test_settings(changes: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "good" / "adapter_config.json").read_text()) | changes
    (folder / "bad" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "bad" / "adapter_model.safetensors").write_bytes(
        (folder / "good" / "adapter_model.safetensors").read_bytes()
    )
    take(folder / "bad", folder)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(["good.gguf", "adapter_config.json", "adapter_model.safetensors"]), data=st.data())
def test_bytes(name: str, data: st.DataObject, folder: Path) -> None:
    """A few bytes of the header are others, or the end is missing."""
    source = folder / name if name == "good.gguf" else folder / "good" / name
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 2500) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    if name == "good.gguf":
        (folder / "bad.gguf").write_bytes(raw)
        take(folder / "bad.gguf", folder)
        return
    for each in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "bad" / each).write_bytes(raw if each == name else (folder / "good" / each).read_bytes())
    take(folder / "bad", folder)
