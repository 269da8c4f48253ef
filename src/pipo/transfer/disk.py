"""Disk → RAM: a few workers keep large reads in flight, each straight into its place or through repacking.

Chunks wait in one FIFO across units, so the drive sees no border between them.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipo.base.clock import Clock, RealClock
from pipo.base.errors import Cancelled, PipoError
from pipo.base.manifest import Extent
from pipo.base.trace import NullTracer, Tracer
from pipo.base.units import round_down, round_up
from pipo.store.index import Read, RepackRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.files import PAGE, Preadv, UncachedFile
from pipo.transfer.handle import Handle

GROUP_ROWS = 8  # rows are repacked in groups of this
_ROW_READERS = 4  # threads that gather embedding rows of a prefill chunk
Repack = Callable[[RepackRows, int, int, int], None]  # (matrix, rows, source address, target address)


@dataclass(frozen=True, slots=True)
class DriveSettings:
    """How the drive is read: bytes per request, requests in flight, past the page cache or not."""

    chunk_bytes: int
    num_workers: int
    direct: bool = True


@dataclass(frozen=True, slots=True)
class _Job:
    """One chunk. `extent` is what is wanted of the file, `address` where its first byte (or row) goes."""

    handle: Handle
    extent: Extent
    place: Place
    place_offset: int
    rows: RepackRows | None


class DiskTransfer:
    """Reads units into places. The first failure ends it: everything submitted later fails with the same error.

    Threads: `submit`, `read_now` and `read_rows` from one thread. Raises ModelNotFound, OverBudget on opening.
    """

    def __init__(
        self,
        files: Sequence[Path],
        settings: DriveSettings,
        *,
        ledger: Ledger,
        repack: Repack | None = None,
        tracer: Tracer | None = None,
        clock: Clock | None = None,
        preadv: Preadv | None = None,
    ) -> None:
        self.settings = settings
        self._repack = repack
        self._tracer = tracer or NullTracer()
        self._clock = clock or RealClock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failure: PipoError | None = None
        self._files = [UncachedFile(f, direct=settings.direct, preadv=preadv or os.preadv) for f in files]
        self._bounce_bytes = settings.chunk_bytes + 2 * PAGE
        self._bounce = Arena(settings.num_workers * self._bounce_bytes, name="transfer buffers", ledger=ledger)
        self._row_readers = ThreadPoolExecutor(_ROW_READERS, thread_name_prefix="rows")
        self._workers = [
            threading.Thread(target=self._work, args=(i, self._bounce.take(self._bounce_bytes)), daemon=True, name=f"read {i}")
            for i in range(settings.num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, reads: Sequence[Read], place: Place, label: str) -> Handle:
        """Start filling `place`; returns at once. The place must not be used before the handle is done."""
        jobs = [job for read in reads for job in self._cut(read)]
        handle = Handle(label, sum(read.extent.num_bytes for read in reads), len(jobs), self._clock)
        try:
            for file_idx in {read.extent.file_idx for read in reads}:
                self._files[file_idx].check()
        except PipoError as error:
            self._failure = self._failure or error
        for extent, offset, rows in jobs:
            self._jobs.put(_Job(handle, extent, place, offset, rows))
        return handle

    def check_files(self) -> None:
        """Raises FileChanged when a path no longer leads to the file that was opened."""
        for file in self._files:
            file.check(by_path=True)

    def read_now(self, extent: Extent) -> bytes:
        """A few bytes, read on this thread. Raises TransferError."""
        with mmap.mmap(-1, _aligned_bytes(extent)) as bounce:
            with memoryview(bounce) as view:
                self._read_aligned(extent, view)
                start = extent.offset % PAGE
                return bytes(view[start : start + extent.num_bytes])

    def read_rows(self, extents: Sequence[Extent], out: memoryview) -> None:
        """Many small reads, one after the other into `out`. Raises TransferError."""
        starts = [0]
        for extent in extents:
            starts.append(starts[-1] + extent.num_bytes)

        def read_one(i: int) -> None:
            out[starts[i] : starts[i + 1]] = self.read_now(extents[i])

        if len(extents) < _ROW_READERS:
            for i in range(len(extents)):
                read_one(i)
        else:
            list(self._row_readers.map(read_one, range(len(extents))))

    def close(self) -> None:
        """Stop the workers, fail what still waits with Cancelled, give the memory back."""
        self._failure = self._failure or Cancelled("the engine was closed")
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._row_readers.shutdown()
        self._bounce.close()
        for file in self._files:
            file.close()

    def _cut(self, read: Read) -> Iterator[tuple[Extent, int, RepackRows | None]]:
        """Chunks of a read: page to page in the file, or whole groups of rows."""
        whole = read.extent
        if read.rows is None:
            start = whole.offset
            while start < whole.end:
                stop = min(round_down(start, PAGE) + self.settings.chunk_bytes, whole.end)
                yield Extent(whole.file_idx, start, stop - start), read.place_offset + start - whole.offset, None
                start = stop
            return
        group = read.rows.row_bytes * GROUP_ROWS
        step = max(self.settings.chunk_bytes // group, 1) * group
        for start in range(0, whole.num_bytes, step):
            size = min(step, whole.num_bytes - start)
            yield Extent(whole.file_idx, whole.offset + start, size), read.place_offset + start, read.rows

    def _work(self, worker_idx: int, bounce: Place) -> None:
        row = f"read {worker_idx}"
        while (job := self._jobs.get()) is not None:
            if self._failure is not None:
                job.handle.job_failed(self._failure)
                continue
            begin = self._clock.now()
            job.handle.job_started()
            try:
                self._do(job, bounce)
            except PipoError as error:
                self._failure = self._failure or error
                job.handle.job_failed(error)
                continue
            self._tracer.zone(row, job.handle.label, begin, self._clock.now(), bytes=job.extent.num_bytes)
            job.handle.job_finished()

    def _do(self, job: _Job, bounce: Place) -> None:
        if job.rows is None:
            first = round_down(job.place_offset, PAGE)
            self._read_aligned(job.extent, job.place.view[first : first + _aligned_bytes(job.extent)])
            job.handle.job_read()
            return
        self._read_aligned(job.extent, bounce.view[: _aligned_bytes(job.extent)])
        job.handle.job_read()
        assert self._repack is not None
        source = bounce.address + job.extent.offset % PAGE
        num_rows = job.extent.num_bytes // job.rows.row_bytes
        self._repack(job.rows, num_rows, source, job.place.address + job.place_offset)

    def _read_aligned(self, extent: Extent, view: memoryview) -> None:
        first = round_down(extent.offset, PAGE)
        self._files[extent.file_idx].read(view, first, extent.end - first)


def _aligned_bytes(extent: Extent) -> int:
    """Bytes of the whole pages an extent touches."""
    return round_up(extent.end, PAGE) - round_down(extent.offset, PAGE)
