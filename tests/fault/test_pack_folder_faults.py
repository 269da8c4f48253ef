"""A pack of a Hugging Face folder that is killed, out of room, or whose shards change: an error, and it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipo.base.errors import FileChanged, MalformedFile, OutputFailed
from pipo.compute import ggml
from pipo.packing import pack as pack_module
from pipo.packing.pack import pack
from tests.support.file_changes import cut, overwrite
from tests.support.hf_bytes import arrays_of, write_folder
from tests.support.hf_folders import edit_json, save_folder
from tests.support.packs import FillingDisk, left_beside, pack_file, plan_of
from tests.support.safetensors_bytes import file_with
from tests.support.tiny_models import SPECS, make_model

TYPE = "q8_0"


@pytest.fixture(autouse=True)
def _enter_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors count as done one by one, as those of a large model do."""
    monkeypatch.setattr(pack_module, "SYNC_BYTES", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows that change places, vectors that are computed, several shards."""
    return save_folder(make_model(SPECS["llama-llama3"]), tmp_path / "tiny", max_shard_size="60KB")


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> bytes:
    pack_file(source, TYPE, tmp_path / "wanted.gguf")
    return (tmp_path / "wanted.gguf").read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_disk_that_fills_up(source: Path, wanted: bytes, tmp_path: Path, share: float) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(OutputFailed, match="No space left"):
        pack_file(source, TYPE, out, pwrite=FillingDisk(int(len(wanted) * share)).pwrite)
    assert not out.exists()
    report = pack_file(source, TYPE, out)
    assert report.resumed > 0
    assert out.read_bytes() == wanted and left_beside(out) == []


def interrupt(source: Path, out: Path, num_bytes: int) -> None:
    with pytest.raises(OutputFailed):
        pack_file(source, TYPE, out, pwrite=FillingDisk(num_bytes).pwrite)


def test_another_tokenizer_in_between_begins_anew(source: Path, wanted: bytes, tmp_path: Path) -> None:
    """The header is that of the new one, so nothing of it is mixed."""
    out = tmp_path / "out.gguf"
    interrupt(source, out, len(wanted) // 2)
    edit_json(source / "tokenizer_config.json", chat_template="{{ messages }}")
    report = pack_file(source, TYPE, out)
    assert report.resumed == 0 and b"{{ messages }}" in out.read_bytes()


def test_a_shard_written_anew_in_between_is_noticed(source: Path, wanted: bytes, tmp_path: Path) -> None:
    """Of the same length, and other values."""
    out = tmp_path / "out.gguf"
    interrupt(source, out, len(wanted) // 2)
    shard = max(source.glob("*.safetensors"))
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-4] + np.float32(0.25).tobytes())
    assert pack_file(source, TYPE, out).resumed == 0
    assert out.read_bytes() != wanted


@pytest.mark.parametrize("idx", [0, -1])
@pytest.mark.parametrize("change", [cut, overwrite])
def test_a_shard_that_changes_meanwhile(change: object, idx: int, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    plan = plan_of(source, TYPE)
    shard = sorted(source.glob("*.safetensors"))[idx]
    change(shard)
    with pytest.raises(FileChanged, match=shard.name):
        pack(plan, out, ggml.load())
    assert not out.exists()


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "input_layernorm"])
def test_a_value_that_is_no_number(name: str, tmp_path: Path) -> None:
    arrays = arrays_of()
    arrays[f"model.layers.0.{name}.weight"] = arrays[f"model.layers.0.{name}.weight"].copy()
    arrays[f"model.layers.0.{name}.weight"].reshape(-1)[-1] = np.nan
    folder = write_folder(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(file_with({k: v.astype(np.float16) for k, v in arrays.items()}))
    with pytest.raises(MalformedFile, match=r"model.safetensors: tensor 'blk.0.*not a finite number"):
        pack_file(folder, TYPE, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


CHILD = """
import sys, time
from pathlib import Path
from pipo.packing import pack as module
from tests.support.packs import pack_file
module.SYNC_BYTES = 1
take = module._Writer.take
def slowly(self, group, rows):
    time.sleep(0.01)
    take(self, group, rows)
module._Writer.take = slowly
pack_file(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


@pytest.mark.parametrize("num_lines", [2, 12])
def test_killed(num_lines: int, source: Path, wanted: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(source), TYPE, str(out)], cwd=Path.cwd())
    journal = out.with_name("out.gguf.part.journal")
    while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > num_lines):
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not out.exists()
    assert pack_file(source, TYPE, out).resumed >= num_lines
    assert out.read_bytes() == wanted and left_beside(out) == []
