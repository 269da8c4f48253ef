"""What tests of the disk path share: random files, a transfer over them, a stand-in for repacking, a deadline."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipo.base.clock import RealClock
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.base.trace import NullTracer, Tracer
from pipo.store.index import RepackRows
from pipo.tiers.ledger import Ledger
from pipo.transfer.disk import DiskTransfer, DriveSettings, Repack
from pipo.transfer.files import Preadv

SMALL_CHUNKS = DriveSettings(chunk_bytes=64 << 10, num_workers=3)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT and posix_fadvise")


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the whole test run with every thread's stack when the block takes longer: a hang must not look like work."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def assert_threads_end(*names: str, within_s: float) -> None:
    """Of the threads whose names begin so, none outlives what it worked for."""
    for thread in [t for t in threading.enumerate() if t.name.startswith(names)]:
        thread.join(within_s)
        assert not thread.is_alive(), thread.name


def write_random(path: Path, num_bytes: int, seed: int = 0) -> bytes:
    """On the drive, not only in the page cache."""
    content = random.Random(seed).randbytes(num_bytes)
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return content


def matrix(name: str, offset: int, row_bytes: int, num_rows: int, file_idx: int = 0) -> TensorSpec:
    """A tensor of single bytes."""
    extent = Extent(FileIdx(file_idx), offset, row_bytes * num_rows)
    return TensorSpec(name, TensorType.I8, (row_bytes, num_rows), extent)


@dataclass
class Opened:
    transfer: DiskTransfer
    ledger: Ledger
    tracer: Tracer


@contextmanager
def opened(
    files: Sequence[Path],
    settings: DriveSettings = SMALL_CHUNKS,
    *,
    repack: Repack | None = None,
    group_bytes: int = 0,
    preadv: Preadv | None = None,
    tracer: Tracer | None = None,
) -> Iterator[Opened]:
    """A transfer, closed at the end, after which its ledger is back where it was."""
    ledger, tracer = Ledger(1 << 30), tracer or NullTracer()
    faulty = {} if preadv is None else {"preadv": preadv}
    transfer = DiskTransfer(
        files,
        settings,
        repack=repack,
        group_bytes=group_bytes,
        ledger=ledger,
        tracer=tracer,
        clock=RealClock(),
        **faulty,
    )
    try:
        yield Opened(transfer, ledger, tracer)
    finally:
        transfer.close()


def xor_rows(rows: RepackRows, num_rows: int, source: int, target: int) -> None:
    """Stands for repacking: whole groups in, the same number of other bytes out."""
    assert num_rows % 8 == 0
    data = ctypes.string_at(source, num_rows * rows.row_bytes)
    ctypes.memmove(target, xored(data), len(data))


def xored(data: bytes) -> bytes:
    return data.translate(bytes(255 - i for i in range(256)))
