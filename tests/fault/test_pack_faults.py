"""A pack that is killed, out of room, or whose source breaks: a clear error, nothing under the name, and it goes on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from bench.page_cache import cached_bytes
from bench.random_model import write_random_model
from pipo.base.errors import FileChanged, MalformedFile, OutputFailed, OverBudget, PipoError, UnsupportedModel
from pipo.base.manifest import FileIdx
from pipo.compute import ggml
from pipo.packing import pack as pack_module
from pipo.packing.pack import pack
from pipo.packing.plan import PackPlan
from tests.support.file_changes import cut, exchange, overwrite, remove
from tests.support.packs import FillingDisk, left_beside, pack_file, plan_of
from tests.support.tiny_models import SPECS, make_model, write_gguf

TYPE = "q5_0"


@pytest.fixture(autouse=True)
def _enter_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors count as done one by one, as those of a large model do."""
    monkeypatch.setattr(pack_module, "SYNC_BYTES", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "m.gguf"
    write_gguf(make_model(SPECS["llama-deep"]), path, GgufType.F16)
    return path


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a pack that nothing interrupts gives."""
    out = tmp_path_factory.mktemp("wanted") / "out.gguf"
    pack_file(source, TYPE, out)
    return out.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_disk_that_fills_up_is_said_and_the_next_run_goes_on(
    source: Path, wanted: bytes, tmp_path: Path, share: float
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(OutputFailed, match=r"No space left.* are free") as failed:
        pack_file(source, TYPE, out, pwrite=FillingDisk(int(len(wanted) * share)).pwrite)
    assert "goes on" in str(failed.value.hint)
    assert not out.exists()
    assert (left_beside(out) == []) == (share < 0.05)  # nothing to go on from: nothing is left
    disk = FillingDisk(len(wanted))
    report = pack_file(source, TYPE, out, pwrite=disk.pwrite)
    assert out.read_bytes() == wanted
    assert left_beside(out) == []
    assert (report.resumed > 0) == (share > 0.05)
    if share == 0.9:
        assert sum(size for _, size in disk.written) < len(wanted) // 3  # what was there was not written again


def test_every_write_may_be_the_last(source: Path, wanted: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    failures = 0
    while not out.exists():
        try:
            pack_file(source, TYPE, out, pwrite=FillingDisk(64 << 10).pwrite)
        except OutputFailed:
            failures += 1
            assert not out.exists() and failures < 100
    assert failures > 5
    assert out.read_bytes() == wanted


@pytest.mark.parametrize("error", [errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_other_refusals_name_the_file(source: Path, tmp_path: Path, error: int) -> None:
    with pytest.raises(OutputFailed, match=r"out.gguf.part: .*"):
        pack_file(source, TYPE, tmp_path / "out.gguf", pwrite=FillingDisk(1 << 15, error).pwrite)


def test_a_file_system_without_direct_writes(source: Path, wanted: bytes, tmp_path: Path) -> None:
    refused: list[int] = []

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        if not refused:
            refused.append(fd)
            raise OSError(errno.EINVAL, "no direct writes here")
        return os.pwrite(fd, view, offset)

    out = tmp_path / "out.gguf"
    pack_file(source, TYPE, out, pwrite=pwrite)
    assert cached_bytes(out) < len(wanted) // 4
    assert out.read_bytes() == wanted


def test_short_writes_are_continued(source: Path, wanted: bytes, tmp_path: Path) -> None:
    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        return os.pwrite(fd, view[:4096] if len(view) > 4096 else view, offset)

    out = tmp_path / "out.gguf"
    pack_file(source, TYPE, out, pwrite=pwrite)
    assert out.read_bytes() == wanted


def test_too_little_room_is_said_before_any_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OutputFailed, match=r"needs .* more .* \(1000 bytes\) are free"):
        pack_file(source, TYPE, tmp_path / "out.gguf", pwrite=lambda *_: pytest.fail("it wrote"))


def test_a_source_that_was_cut_before_is_refused_with_the_tensor(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(source.read_bytes()[:-100_000])
    with pytest.raises(MalformedFile, match=r"tensor '.*' takes bytes .*, the file ends at"):
        pack_file(short, TYPE, tmp_path / "out.gguf")
    assert left_beside(tmp_path / "out.gguf") == []


@pytest.mark.parametrize("change", [cut, overwrite, exchange, remove])
def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    copy, out = tmp_path / "copy.gguf", tmp_path / "out.gguf"
    copy.write_bytes(source.read_bytes())
    calls: list[int] = []

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        calls.append(1)
        if len(calls) == 3:
            change(copy)
        return os.pwrite(fd, view, offset)

    with pytest.raises(FileChanged):
        pack_file(copy, TYPE, out, pwrite=pwrite)
    assert not out.exists()


def test_another_source_begins_anew(source: Path, wanted: bytes, tmp_path: Path) -> None:
    other, out = tmp_path / "other.gguf", tmp_path / "out.gguf"
    write_gguf(make_model(replace(SPECS["llama-deep"], seed=99)), other, GgufType.F16)
    with pytest.raises(OutputFailed):
        pack_file(other, TYPE, out, pwrite=FillingDisk(len(wanted) // 2).pwrite)
    assert pack_file(source, TYPE, out).resumed == 0
    assert out.read_bytes() == wanted


def test_another_type_begins_anew(source: Path, wanted: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(OutputFailed):
        pack_file(source, "q8_0", out, pwrite=FillingDisk(len(wanted) // 2).pwrite)
    assert pack_file(source, TYPE, out).resumed == 0
    assert out.read_bytes() == wanted


def test_a_part_that_was_cut_is_written_again_from_there(source: Path, wanted: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(OutputFailed):
        pack_file(source, TYPE, out, pwrite=FillingDisk(len(wanted) * 9 // 10).pwrite)
    part = out.with_name("out.gguf.part")
    os.truncate(part, part.stat().st_size // 2)
    assert pack_file(source, TYPE, out).resumed > 0
    assert out.read_bytes() == wanted


def test_two_at_once_do_not_spoil_each_other(source: Path, wanted: bytes, tmp_path: Path) -> None:
    out, refusals = tmp_path / "out.gguf", []

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        if not refusals:
            with pytest.raises(OutputFailed, match="another pipo") as refused:
                pack_file(source, TYPE, out)
            refusals.append(refused.value)
        return os.pwrite(fd, view, offset)

    pack_file(source, TYPE, out, pwrite=pwrite)
    assert refusals and out.read_bytes() == wanted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(source: Path, tmp_path: Path, value: float) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes())
    _put(broken, "blk.3.ffn_up.weight", 2, value)
    with pytest.raises(MalformedFile, match=r"'blk.3.ffn_up.weight' has a value in row 2 .* not a finite"):
        pack_file(broken, TYPE, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_weights_that_the_type_cannot_hold(tmp_path: Path) -> None:
    source, out = tmp_path / "large.gguf", tmp_path / "out.gguf"
    write_gguf(make_model(SPECS["llama"]), source, GgufType.BF16)
    _put(source, "blk.1.attn_q.weight", 5, 0x4788 << 16)
    with pytest.raises(UnsupportedModel, match=r"'blk.1.attn_q.weight' has 69632 in row 5, Q8_0 holds at most 65504"):
        pack_file(source, "q8_0", out)
    pack_file(source, "f32", out)


def _put(path: Path, tensor: str, row: int, value: float | int) -> None:
    """A value in the middle of a row of F16, or the bits of one in a row of BF16."""
    (found,) = (t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
    raw = np.float16(value).tobytes() if found.tensor_type is GgufType.F16 else int(value).to_bytes(4, "little")[2:]
    with path.open("r+b") as stream:
        stream.seek(int(found.data_offset) + (row * int(found.shape[0]) + 7) * 2)
        stream.write(raw)


def test_a_budget_too_small_is_refused_and_the_number_named_works(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OverBudget) as refused:
        pack_file(source, TYPE, tmp_path / "out.gguf", limit_bytes=1 << 20)
    smallest = refused.value.smallest_bytes
    assert smallest is not None
    pack_file(source, TYPE, tmp_path / "out.gguf", limit_bytes=smallest)
    with pytest.raises(OverBudget):
        plan_of(source, TYPE, limit_bytes=smallest - 1)


def test_a_failed_read_ends_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(source, TYPE)
    gone = tmp_path / "copy.gguf"
    gone.write_bytes(source.read_bytes())
    moved: PackPlan = replace(plan, manifest=replace(plan.manifest, files=(gone,)))
    assert plan.manifest.tensors["output.weight"].extent.file_idx == FileIdx(0)
    with pytest.raises(FileChanged):  # it is not the file that the header was read from
        pack(moved, tmp_path / "out.gguf", ggml.load())


CHILD = """
import sys
from pathlib import Path
from tests.support.packs import pack_file
pack_file(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes K-quants a second or two."""
    path = tmp_path_factory.mktemp("slow") / "random.gguf"
    write_random_model(path, "smoke", "f16")
    return path


@pytest.mark.parametrize("num_lines", [2, 20])
def test_killed_it_goes_on_and_the_file_is_the_same(slow_source: Path, tmp_path: Path, num_lines: int) -> None:
    out, undisturbed = tmp_path / "out.gguf", tmp_path / "undisturbed.gguf"
    pack_file(slow_source, "q5_k", undisturbed)
    code = f"from pipo.packing import pack; pack.SYNC_BYTES = 1\n{CHILD}"
    child = subprocess.Popen([sys.executable, "-c", code, str(slow_source), "q5_k", str(out)], cwd=Path.cwd())
    journal = out.with_name("out.gguf.part.journal")
    while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > num_lines):
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not out.exists()
    report = pack_file(slow_source, "q5_k", out)
    assert report.resumed >= num_lines
    assert out.read_bytes() == undisturbed.read_bytes()
    assert left_beside(out) == []


def test_a_small_file_system_fills_up(source: Path, wanted: bytes, tmp_path: Path) -> None:
    """The real thing, where this process may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    size = len(wanted) // 2 // 4096 * 4096
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(OutputFailed, match="are free"):
            pack_file(source, TYPE, small / "out.gguf")
        (small / "filler").write_bytes(bytes(size // 2))
        with pytest.raises(PipoError):
            pack_file(source, TYPE, small / "out.gguf")
        assert not (small / "out.gguf").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)
