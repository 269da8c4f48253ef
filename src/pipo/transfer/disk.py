"""Disk → RAM: worker threads that read chunks past the page cache straight into places, first come, first served.

What may turn out not to be wanted, a guess, waits behind all else and leaves some workers to it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from pipo.base.clock import Clock
from pipo.base.errors import Cancelled, FileChanged, PipoError
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import Extent
from pipo.base.trace import Tracer
from pipo.base.units import KIB, round_up
from pipo.store.index import Read, RepackRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.chunks import PlainChunk, RepackChunk, RowCopy, Span, cut_copies, cut_reads
from pipo.transfer.files import ALIGNMENT, Preadv, UncachedFile
from pipo.transfer.handle import Handle

log = logging.getLogger(__name__)

WORKER_NICENESS = 5  # above that of the program
_MOST_NICENESS = 19
GUESSING_SHARE = 0.5  # of the workers: the others begin at once with a read that is wanted for certain
CLOSE_S = 0.4  # how long `close` waits for a read that is under way
_COPY_BYTES = 64 * KIB  # most of an embedding row or norm that is read at once

Repack = Callable[[RepackRows, int, int, int], None]  # rows, how many of them, source and target address


@dataclass(frozen=True, slots=True)
class DriveSettings:
    """How a drive is read: the size of one request, how many at once, and whether past the page cache."""

    chunk_bytes: int
    num_workers: int
    direct: bool = True

    @property
    def in_flight_bytes(self) -> int:
        """Asked for at any time while the drive is busy."""
        return self.chunk_bytes * self.num_workers

    def bounce_bytes(self, *, repacks: bool, group_bytes: int = 0) -> int:
        """Buffers of all workers together. Without repacking only embedding rows, norms and routers go through them;
        with it a chunk, or the largest group of rows that is repacked at once, where that is more.
        """
        largest = max(self.chunk_bytes, group_bytes, _COPY_BYTES) if repacks else _COPY_BYTES
        return self.num_workers * round_up(largest + 2 * ALIGNMENT, ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _ReadJob:
    handle: Handle
    chunk: PlainChunk | RepackChunk
    place: Place
    after: Handle | None = None  # what still uses the place


@dataclass(frozen=True, slots=True)
class _CopyJob:
    handle: Handle
    copies: Sequence[RowCopy]
    out: memoryview


class _Worker:
    """One thread, its bounce buffer, and what it is busy with."""

    def __init__(self, row: str, bounce: Place) -> None:
        self.row = row
        self.bounce = bounce
        self.handle: Handle | None = None


class DiskTransfer:
    """Moves units from files to places. The first failure poisons it: what is queued, and all that is submitted
    later, ends with the same error. `close` gives everything back.

    Threads: `submit`, `submit_rows`, `read_now` and `close` from any, `close` last.
    """

    def __init__(
        self,
        files: Sequence[Path],
        settings: DriveSettings,
        *,
        identities: Sequence[FileIdentity] | None = None,
        repack: Repack | None,
        group_bytes: int = 0,
        ledger: Ledger,
        tracer: Tracer,
        clock: Clock,
        preadv: Preadv = os.preadv,
    ) -> None:
        """`identities` are the versions of the files that are wanted; None takes what is there. `group_bytes`: see
        DriveSettings.bounce_bytes.

        Raises ReadFailed when a file cannot be opened, FileChanged when it is not the wanted one, OverBudget when the
        bounce buffers do not fit.
        """
        assert settings.chunk_bytes % ALIGNMENT == 0 and settings.chunk_bytes > 0 and settings.num_workers > 0
        self.settings = settings
        self._repack = repack
        self._tracer = tracer
        self._clock = clock
        self._jobs: deque[_ReadJob | _CopyJob] = deque()
        self._urgent: deque[_ReadJob | _CopyJob] = deque()
        self._guesses: deque[_ReadJob | _CopyJob] = deque()
        self._num_guessing = 0
        self._most_guessing = max(int(settings.num_workers * GUESSING_SHARE), 1)
        self._ready = threading.Condition()  # guards the queues, the failure and the number of workers
        self._failure: BaseException | None = None
        self._is_closed = False
        self._all_left = threading.Event()
        with ExitStack() as resources:
            wanted: Sequence[FileIdentity | None] = identities or [None] * len(files)
            pairs = zip(files, wanted, strict=True)
            self._files = [_opened(path, identity, settings, preadv, resources) for path, identity in pairs]
            num_bytes = settings.bounce_bytes(repacks=repack is not None, group_bytes=group_bytes)
            bounce = resources.enter_context(Arena(num_bytes, name="transfer buffers", ledger=ledger))
            self._resources = resources.pop_all()
        share = num_bytes // settings.num_workers
        self._workers = [_Worker(f"read {i}", bounce.take(share)) for i in range(settings.num_workers)]
        self._num_working = settings.num_workers
        for worker in self._workers:
            threading.Thread(target=self._work, args=(worker,), name=f"pipo {worker.row}", daemon=True).start()

    @property
    def is_direct(self) -> bool:
        """Whether every file is read past the page cache; known for certain after the first reads."""
        return all(file.is_direct for file in self._files)

    def submit(
        self, reads: Sequence[Read], place: Place, label: str, after: Handle | None = None, *, is_guess: bool = False
    ) -> Handle:
        """Queue the reads of one unit into its place, which `after` still uses until it is done. A guess waits until
        nothing else does.

        Never blocks and never raises: the handle tells. Where `after` failed, the reads end with its error.
        """
        chunks = cut_reads(reads, self.settings.chunk_bytes)
        num_bytes = sum(read.extent.num_bytes for read in reads)
        handle = Handle(label, num_bytes=num_bytes, num_chunks=len(chunks), submitted_s=self._clock.now())
        self._check_open_files({read.extent.file_idx for read in reads})
        queue = self._guesses if is_guess else self._jobs
        self._enqueue(queue, [_ReadJob(handle, chunk, place, after) for chunk in chunks])
        return handle

    def hurry(self, handle: Handle) -> None:
        """A guess is wanted for certain: what of it has not begun is queued with all else."""
        with self._ready:
            jobs = self._withdraw(handle)
            self._jobs.extend(jobs)
            self._ready.notify(len(jobs))

    def drop(self, handle: Handle) -> bool:
        """A guess is not wanted. True where none of it had begun: it ends as Cancelled, and its place is free."""
        with self._ready:
            jobs = self._withdraw(handle)
            if not jobs or len(jobs) < handle.num_chunks:
                self._guesses.extendleft(reversed(jobs))
                return False
        self._drop(jobs, Cancelled(f"{handle.label} is not wanted"))
        return True

    def _withdraw(self, handle: Handle) -> list[_ReadJob | _CopyJob]:
        """What of a guess nobody has begun. Holding the lock; the queue stays the same object, which others have."""
        jobs = [job for job in self._guesses if job.handle is handle]
        for job in jobs:
            self._guesses.remove(job)
        return jobs

    def submit_rows(self, extents: Sequence[Extent], out: memoryview) -> Handle:
        """Queue small extents, one after another into `out`, in parallel and ahead of everything queued. Never blocks
        and never raises: the handle tells.
        """
        num_bytes = sum(extent.num_bytes for extent in extents)
        assert out.nbytes == num_bytes
        copies = cut_copies(extents, _COPY_BYTES)
        share = -(-len(copies) // self.settings.num_workers)
        groups = [copies[i : i + share] for i in range(0, len(copies), max(share, 1))]
        handle = Handle("rows", num_bytes=num_bytes, num_chunks=len(groups), submitted_s=self._clock.now())
        self._check_open_files({extent.file_idx for extent in extents})
        self._enqueue(self._urgent, [_CopyJob(handle, group, out.cast("B")) for group in groups])
        return handle

    def read_now(self, extent: Extent) -> bytes:
        """Read one small extent. Blocks. Raises TransferError, Cancelled."""
        out = bytearray(extent.num_bytes)
        self.submit_rows([extent], memoryview(out)).wait()
        return bytes(out)

    def check_files(self) -> None:
        """Raises FileChanged, and ends all transfers, when a path no longer names the file that was opened."""
        try:
            for file in self._files:
                file.check_path()
        except FileChanged as error:
            self._poison(error)
            raise

    def close(self) -> None:
        """End what is unfinished as Cancelled, stop the workers, release files and buffers. Takes CLOSE_S at most:
        a read that is stuck longer keeps its worker, which cleans up whenever it returns. Closing again does nothing.
        """
        self._poison(Cancelled("the transfer was closed"))
        with self._ready:
            was_closed, self._is_closed = self._is_closed, True
            self._ready.notify_all()
        if was_closed or self._all_left.wait(CLOSE_S):
            return
        for worker in self._workers:
            if (handle := worker.handle) is not None:
                log.warning("worker=%r unit=%r reason=still reading at close", worker.row, handle.label)
                handle.abandon(self._clock.now(), Cancelled("the transfer was closed"))

    def _check_open_files(self, file_idxs: set[int]) -> None:
        if self._failure is not None:
            return
        try:
            for idx in file_idxs:
                self._files[idx].check_unchanged()
        except FileChanged as error:
            self._poison(error)

    def _enqueue(self, queue: deque[_ReadJob | _CopyJob], jobs: Sequence[_ReadJob | _CopyJob]) -> None:
        with self._ready:
            failure = self._failure
            if failure is None:
                queue.extend(jobs)
                self._ready.notify(len(jobs))
                return
        self._drop(jobs, failure)

    def _poison(self, failure: BaseException) -> BaseException:
        """Keep the first failure, end every queued job with it, and return it."""
        with self._ready:
            self._failure = self._failure or failure.with_traceback(None)
            first = self._failure
            queues = self._urgent, self._jobs, self._guesses
            dropped = [job for queue in queues for job in queue]
            for queue in queues:
                queue.clear()
        self._drop(dropped, first)
        return first

    def _drop(self, jobs: Sequence[_ReadJob | _CopyJob], failure: BaseException) -> None:
        for job in jobs:
            job.handle.end_chunk(self._clock.now(), failure)

    def _work(self, worker: _Worker) -> None:
        try:
            _yield_to_compute()
            while self._serve_one(worker):
                pass
        finally:
            self._leave()

    def _serve_one(self, worker: _Worker) -> bool:
        """Wait for a job and do it. False when the transfer was closed. Keeps no reference to a place in between."""
        job, is_guess = self._next_job()
        if job is None:
            return False
        worker.handle = job.handle
        error: BaseException | None = None
        try:
            if isinstance(job, _ReadJob) and job.after is not None:
                job.after.wait_unless(self._has_ended)
            job.handle.begin_chunk(self._clock.now())
            self._move(job, worker)
        except PipoError as failure:
            error = self._poison(failure)
        except BaseException as failure:  # our own bug; whoever waits must hear of it all the same
            error = self._poison(failure)
            raise
        finally:
            worker.handle = None
            if is_guess:
                self._end_guess()
            job.handle.end_chunk(self._clock.now(), error)
        return True

    def _next_job(self) -> tuple[_ReadJob | _CopyJob | None, bool]:
        """And whether it is a guess. None when the transfer was closed."""
        with self._ready:
            while not (self._urgent or self._jobs or self._may_guess or self._is_closed):
                self._ready.wait()
            if self._is_closed:
                return None, False
            if self._urgent or self._jobs:
                return (self._urgent or self._jobs).popleft(), False
            self._num_guessing += 1
            return self._guesses.popleft(), True

    @property
    def _may_guess(self) -> bool:
        return bool(self._guesses) and self._num_guessing < self._most_guessing

    def _end_guess(self) -> None:
        with self._ready:
            self._num_guessing -= 1
            self._ready.notify()

    def _has_ended(self) -> bool:
        return self._failure is not None

    def _leave(self) -> None:
        """The last worker out gives files and buffers back: never while a read is under way."""
        with self._ready:
            self._num_working -= 1
            is_last = not self._num_working
        if is_last:
            self._resources.close()
            self._all_left.set()

    def _move(self, job: _ReadJob | _CopyJob, worker: _Worker) -> None:
        """Read the job's bytes, then repack them where that is wanted."""
        begin = self._clock.now()
        read_bytes = self._read(job, worker.bounce)
        was_read = self._clock.now()
        job.handle.end_read(read_bytes, was_read)
        self._tracer.zone(worker.row, job.handle.label, begin, was_read)
        if isinstance(job, _ReadJob) and isinstance(job.chunk, RepackChunk):
            if self._is_closed:  # the read was stuck: what repacks may be gone by now
                raise Cancelled("the transfer was closed")
            self._repack_chunk(job.chunk, worker.bounce, job.place)
            self._tracer.zone(worker.row, f"repack {job.handle.label}", was_read, self._clock.now())

    def _read(self, job: _ReadJob | _CopyJob, bounce: Place) -> int:
        """Returns the bytes that came from the drive."""
        if isinstance(job, _CopyJob):
            return self._copy_rows(job, bounce)
        chunk = job.chunk
        if isinstance(chunk, PlainChunk):
            return self._read_span(chunk.span, job.place.view[chunk.place_offset :])
        return self._read_span(chunk.span, bounce.view)

    def _copy_rows(self, job: _CopyJob, bounce: Place) -> int:
        read_bytes = 0
        for copy in job.copies:
            if self._has_ended():  # many rows must not hold up `close`
                raise Cancelled("the transfer has ended")
            read_bytes += self._read_span(copy.span, bounce.view)
            out_stop, stop = copy.out_offset + copy.num_bytes, copy.skip_bytes + copy.num_bytes
            job.out[copy.out_offset : out_stop] = bounce.view[copy.skip_bytes : stop]
        return read_bytes

    def _read_span(self, span: Span, target: memoryview) -> int:
        return self._files[span.file_idx].read(target[: span.num_bytes], span.offset, span.needed_bytes)

    def _repack_chunk(self, chunk: RepackChunk, bounce: Place, place: Place) -> None:
        assert self._repack is not None, "a layout with repacked tensors needs a repack function"
        source, target = bounce.address + chunk.skip_bytes, place.address + chunk.place_offset
        self._repack(chunk.rows, chunk.num_rows, source, target)


def _yield_to_compute() -> None:
    """Lower this thread's priority below the compute threads'.

    Those meet at a barrier after every op: one of them losing its core to a worker that repacks stalls them all. On 2
    cores a cold pass over a 7B took 5.9 s at equal priority and 1.3 s like this; decode was the same.
    """
    if sys.platform != "linux":  # where priorities are per thread
        return
    thread = threading.get_native_id()
    wanted = os.getpriority(os.PRIO_PROCESS, thread) + WORKER_NICENESS  # the program may have been started with `nice`
    with suppress(OSError):  # a sandbox may forbid it: that costs speed, nothing else
        os.setpriority(os.PRIO_PROCESS, thread, min(wanted, _MOST_NICENESS))


def _opened(
    path: Path, identity: FileIdentity | None, settings: DriveSettings, preadv: Preadv, resources: ExitStack
) -> UncachedFile:
    file = UncachedFile(path, direct=settings.direct, preadv=preadv, identity=identity)
    resources.callback(file.close)
    return file
