"""Reads of transfer.disk that go around the page cache, and what happens where the system refuses that."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipo.base.manifest import Extent, FileIdx
from pipo.transfer import files as transfer_files
from pipo.transfer.disk import DriveSettings
from pipo.transfer.files import Preadv
from tests.support.disk_units import check_bytes, outcomes, slots, submit_all
from tests.support.transfers import LINUX, SMALL_CHUNKS, opened, xor_rows


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> Preadv:
    def refuse(path: Path) -> int:
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    monkeypatch.setattr(transfer_files, "_open_uncached", refuse)
    return os.preadv


def refuse_at_first_read(monkeypatch: pytest.MonkeyPatch) -> Preadv:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return os.preadv(fd, buffers, offset)

    return preadv


@LINUX
@pytest.mark.parametrize("refuse", [refuse_at_open, refuse_at_first_read])
def test_direct_reads_refused(
    path: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refuse: Callable[[pytest.MonkeyPatch], Preadv],
) -> None:
    with opened([path], repack=xor_rows, preadv=refuse(monkeypatch)) as disk, slots(disk.ledger) as places:
        assert outcomes(submit_all(disk.transfer, places)) == [None, None, None]
        for i, place in enumerate(places):
            check_bytes(i, place, content)
        assert not disk.transfer.is_direct
    with opened([path], preadv=refuse(monkeypatch)) as again:
        assert again.transfer.read_now(Extent(FileIdx(0), 0, 10)) == content[:10]
    assert caplog.text.count("direct_io=off") == 1, "said once per drive, with the reason"


def cached_pages(path: Path) -> int:
    """Of the file in the page cache. Source: mincore(2)."""
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        flags = (ctypes.c_ubyte * (len(mapped) // 4096 + 1))()
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(len(mapped)), flags)
        del held
        assert not failed
        return sum(flag & 1 for flag in flags)


@LINUX
@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_in_the_page_cache(path: Path, content: bytes, direct: bool) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(path) == 0
    settings = DriveSettings(SMALL_CHUNKS.chunk_bytes, SMALL_CHUNKS.num_workers, direct)
    with opened([path], settings, repack=xor_rows) as disk, slots(disk.ledger) as places:
        assert outcomes(submit_all(disk.transfer, places)) == [None, None, None]
        disk.transfer.read_now(Extent(FileIdx(0), 100_000, 100))
        assert cached_pages(path) == 0
