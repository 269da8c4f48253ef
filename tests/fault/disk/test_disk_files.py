"""transfer.disk when the file is missing, or changes while it is open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipo.base.clock import VirtualClock
from pipo.base.errors import FileChanged, OverBudget, ReadFailed
from pipo.base.manifest import Extent, FileIdx
from pipo.base.trace import NullTracer
from pipo.tiers.ledger import Ledger
from pipo.transfer.disk import DiskTransfer
from tests.support.disk_units import outcomes, slots, submit_all
from tests.support.file_changes import cut, exchange, overwrite, remove
from tests.support.transfers import LINUX, SMALL_CHUNKS, opened, xor_rows


@pytest.mark.parametrize("change", [cut, overwrite])
def test_change_of_the_open_file_is_seen_by_the_next_submit(
    path: Path, content: bytes, change: Callable[[Path], None]
) -> None:
    with opened([path], repack=xor_rows) as disk, slots(disk.ledger) as places:
        assert outcomes(submit_all(disk.transfer, places)) == [None, None, None]
        change(path)
        assert {type(error) for error in outcomes(submit_all(disk.transfer, places))} == {FileChanged}
        with pytest.raises(FileChanged):
            disk.transfer.read_now(Extent(FileIdx(0), 0, 1))


@pytest.mark.parametrize("change", [cut, overwrite, exchange, remove])
def test_change_of_the_path_is_seen_by_check_files(path: Path, content: bytes, change: Callable[[Path], None]) -> None:
    with opened([path], repack=xor_rows) as disk, slots(disk.ledger) as places:
        disk.transfer.check_files()
        change(path)
        with pytest.raises(FileChanged) as failed:
            disk.transfer.check_files()
        assert str(path) in str(failed.value)
        assert outcomes(submit_all(disk.transfer, places)) == [failed.value] * 3


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ReadFailed, match="ENOENT"), opened([tmp_path / "gone"]):
        pass


@LINUX
def test_refused_start_leaves_no_descriptor(path: Path, content: bytes) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OverBudget):
        DiskTransfer(
            [path, path], SMALL_CHUNKS, repack=None, ledger=Ledger(1), tracer=NullTracer(), clock=VirtualClock()
        )
    with pytest.raises(ReadFailed), opened([path, path.with_name("gone")]):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
