"""Stand-ins for tests: a drive in memory that is slow, shuffled or broken on purpose, and a broken `os.preadv`."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pipo.base.clock import Clock
from pipo.base.errors import Cancelled, ReadFailed
from pipo.base.manifest import Extent
from pipo.base.units import round_down, round_up
from pipo.store.index import Read
from pipo.tiers.ram import Place
from pipo.transfer.disk import Repack
from pipo.transfer.files import ALIGNMENT, Preadv
from pipo.transfer.handle import Handle

_TICK_S = 1e-6  # waiting must outlast rounding
_NOT_THERE_YET = b"\xa5"  # what a place holds until its bytes arrive


class Fault(Enum):
    FAIL = "fail"
    SHORT = "short"  # returns half of what was asked for
    SLOW = "slow"
    END = "end"  # as at the end of the file


def faulty_preadv(
    fault: Fault, nth: int, *, for_ever: bool = False, error: int = errno.EIO, delay_s: float = 0.05
) -> Preadv:
    """An `os.preadv` whose `nth` call (1 is the first) goes wrong, and every later one too with `for_ever`."""
    calls = itertools.count(1)  # its next() is atomic

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        call = next(calls)
        if call < nth or (call > nth and not for_ever):
            return os.preadv(fd, buffers, offset)
        if fault is Fault.FAIL:
            raise OSError(error, os.strerror(error))
        if fault is Fault.END:
            return 0
        if fault is Fault.SLOW:
            time.sleep(delay_s)
            return os.preadv(fd, buffers, offset)
        half = round_up(len(buffers[0]) // 2, ALIGNMENT)
        return os.preadv(fd, [buffers[0][:half]], offset)

    return preadv


@dataclass(frozen=True, slots=True)
class NullDrive:
    """`bytes_per_s` in order of submission; then each transfer is late by up to `max_jitter_s`, drawn from `seed`.

    The transfer number `fail_nth` (1 is the first) ends in ReadFailed.
    """

    bytes_per_s: float = 1e9
    max_jitter_s: float = 0.0
    seed: int = 0
    fail_nth: int | None = None


class NullTransfer:
    """DiskTransfer's interface over bytes in memory, without threads: bytes arrive when somebody asks for them and
    their time has come. Until then the place holds rubbish. Threads: one.
    """

    def __init__(self, files: Sequence[bytes], drive: NullDrive, *, clock: Clock, repack: Repack | None = None) -> None:
        self.clock = clock
        self._files = files
        self._drive = drive
        self._repack = repack
        self._random = random.Random(drive.seed)
        self._pending: list[_NullHandle] = []
        self._num_submitted = 0
        self._free_at_s = 0.0
        self._failure: BaseException | None = None

    def submit(
        self, reads: Sequence[Read], place: Place, label: str, after: Handle | None = None, *, is_guess: bool = False
    ) -> Handle:
        """Guesses wait for their turn as all else does."""
        assert after is None, "no device copies from these places"
        self._num_submitted += 1
        num_bytes = sum(read.extent.num_bytes for read in reads)
        begin_s = max(self.clock.now(), self._free_at_s)
        self._free_at_s = begin_s + num_bytes / self._drive.bytes_per_s
        ready_s = self._free_at_s + self._random.uniform(0, self._drive.max_jitter_s)
        will_fail = self._num_submitted == self._drive.fail_nth
        handle = _NullHandle(self, label, num_bytes, _Arrival(tuple(reads), place, begin_s, ready_s, will_fail))
        for read in reads:
            place.view[read.place_offset : read.place_offset + read.extent.num_bytes] = (
                _NOT_THERE_YET * read.extent.num_bytes
            )
        self._pending.append(handle)
        self.advance()
        return handle

    def submit_rows(self, extents: Sequence[Extent], out: memoryview) -> Handle:
        """Takes no time."""
        now = self.clock.now()
        handle = Handle("rows", num_bytes=sum(e.num_bytes for e in extents), num_chunks=1, submitted_s=now)
        if self._failure is None:
            out.cast("B")[:] = b"".join(self._bytes(e.file_idx, e.offset, e.end) for e in extents)
        handle.end_chunk(now, self._failure)
        return handle

    def hurry(self, handle: Handle) -> None:
        pass

    def drop(self, handle: Handle) -> bool:
        """Never in time."""
        return False

    def read_now(self, extent: Extent) -> bytes:
        out = bytearray(extent.num_bytes)
        self.submit_rows([extent], memoryview(out)).wait()
        return bytes(out)

    def check_files(self) -> None:
        pass

    def close(self) -> None:
        self._failure = self._failure or Cancelled("the transfer was closed")
        self.advance()

    def advance(self) -> None:
        """Deliver what is due by now, in the order of arrival."""
        while self._failure is None and (handle := self._next_due()) is not None:
            if handle.arrival.will_fail:
                self._failure = _read_failed(handle)
            else:
                self._pending.remove(handle)
                self._deliver(handle)
        if self._failure is not None:
            for handle in self._pending:
                handle.end_chunk(self.clock.now(), self._failure)
            self._pending.clear()

    def _next_due(self) -> _NullHandle | None:
        due = [h for h in self._pending if h.arrival.ready_s <= self.clock.now()]
        return min(due, key=lambda h: h.arrival.ready_s, default=None)

    def _deliver(self, handle: _NullHandle) -> None:
        arrival = handle.arrival
        handle.begin_chunk(arrival.begin_s)
        for read in arrival.reads:
            if read.rows is None:
                self._deliver_pages(read, arrival.place)
            else:
                self._deliver_repacked(read, arrival.place)
        handle.end_read(handle.num_bytes, arrival.ready_s)
        handle.end_chunk(arrival.ready_s)

    def _deliver_pages(self, read: Read, place: Place) -> None:
        """Whole pages, edges included, as direct I/O does."""
        extent = read.extent
        begin, end = round_down(extent.offset, ALIGNMENT), round_up(extent.end, ALIGNMENT)
        pages = self._bytes(extent.file_idx, begin, end)
        start = read.place_offset - (extent.offset - begin)
        place.view[start : start + len(pages)] = pages

    def _deliver_repacked(self, read: Read, place: Place) -> None:
        assert self._repack is not None and read.rows is not None
        raw = self._bytes(read.extent.file_idx, read.extent.offset, read.extent.end)
        bounce = (ctypes.c_char * len(raw)).from_buffer_copy(raw)
        target = place.address + read.place_offset
        self._repack(read.rows, read.rows.num_rows, ctypes.addressof(bounce), target)

    def _bytes(self, file_idx: int, start: int, stop: int) -> bytes:
        return self._files[file_idx][start:stop]


@dataclass(frozen=True, slots=True)
class _Arrival:
    reads: tuple[Read, ...]
    place: Place
    begin_s: float
    ready_s: float
    will_fail: bool


class _NullHandle(Handle):
    """Asking for it moves the drive on; waiting for it moves the clock on."""

    def __init__(self, transfer: NullTransfer, label: str, num_bytes: int, arrival: _Arrival) -> None:
        super().__init__(label, num_bytes=num_bytes, num_chunks=1, submitted_s=transfer.clock.now())
        self.arrival = arrival
        self._transfer = transfer

    @property
    def is_done(self) -> bool:
        self._transfer.advance()
        return super().is_done

    def wait(self, timeout_s: float | None = None) -> None:
        if not self.is_done:
            left_s = self.arrival.ready_s - self._transfer.clock.now() + _TICK_S
            self._transfer.clock.sleep(left_s if timeout_s is None else min(left_s, timeout_s))
            self._transfer.advance()
        super().wait(0)


def _read_failed(handle: _NullHandle) -> ReadFailed:
    message = f"cannot read {handle.label} (EIO)"
    return ReadFailed(message, path="null", offset=0, wanted_bytes=handle.num_bytes, got_bytes=0)
