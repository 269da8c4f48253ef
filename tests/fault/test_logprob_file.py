"""The temporary file of a reference: what comes back, no name that could be left behind, and drives that fail."""

from __future__ import annotations

import os
import resource
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipo.base.errors import TransferError, UnexpectedEof, UsageError
from pipo.generation import logprob_file
from pipo.generation.logprob_file import LogprobFile

VOCAB = 1000
Usage = namedtuple("Usage", "total used free")


def rows(num: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(1)
    return (random.integers(0, 1 << 16, VOCAB).astype(np.uint16) for _ in range(num))


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Longer ones fail with EFBIG, as on a full drive with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_file, "_SYNC_BYTES", 5 * VOCAB)  # the page cache is emptied on the way
    with LogprobFile(tmp_path / "new", 20, VOCAB) as file:
        for row in rows(20):
            file.write(row)
        file.rewind()
        found = np.empty(VOCAB, np.uint16)
        for row in rows(20):
            file.read_into(found)
            assert (found == row).all()
        with pytest.raises(UnexpectedEof, match=f"wanted {2 * VOCAB} bytes, got 0"):
            file.read_into(found)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    with LogprobFile(tmp_path, 20, VOCAB) as file:
        file.write(next(rows(1)))
        assert list(tmp_path.iterdir()) == []


def test_a_drive_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob_file.shutil, "disk_usage", lambda folder: Usage(0, 0, 20 * 2 * VOCAB - 1))
    with pytest.raises(UsageError, match=r"take 39\.1 KiB in .*, where 39\.1 KiB are free") as caught:
        LogprobFile(tmp_path, 20, VOCAB)
    assert "--tmp-dir" in str(caught.value.hint) and "--max-windows" in str(caught.value.hint)


def test_a_drive_that_fills_up_ends_in_an_error_that_says_where(tmp_path: Path) -> None:
    with LogprobFile(tmp_path, 20, VOCAB) as file, files_of_at_most(5000):
        file.write(next(rows(1)))
        file.write(next(rows(1)))
        with pytest.raises(TransferError, match=r"EFBIG.* at offset 4000, wanted 2000 bytes, got 1000"):
            file.write(next(rows(1)))


def test_a_file_that_was_cut_is_noticed(tmp_path: Path) -> None:
    with LogprobFile(tmp_path, 2, VOCAB) as file:
        for row in rows(2):
            file.write(row)
        os.ftruncate(file._file.fileno(), 3000)
        file.rewind()
        found = np.empty(VOCAB, np.uint16)
        file.read_into(found)
        with pytest.raises(UnexpectedEof, match="at offset 2000, wanted 2000 bytes, got 1000"):
            file.read_into(found)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--tmp-dir .*file/under: cannot be written to"):
        LogprobFile(tmp_path / "file" / "under", 1, VOCAB)
