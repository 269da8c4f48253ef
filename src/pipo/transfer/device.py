"""RAM ↔ device: one thread per direction that copies in large blocks, first come, first served.

Copies block this thread, not the one that computes: libggml's blocking copy takes the device's transfer queue, its
asynchronous one mostly the queue that computes, and copies first where the memory is not pinned.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pipo.base.clock import Clock
from pipo.base.errors import Cancelled
from pipo.base.trace import Tracer
from pipo.base.units import MIB
from pipo.compute.device import DeviceBuffer
from pipo.transfer.handle import Handle

BLOCK_BYTES = 16 * MIB  # most that is copied at once: a stop takes effect between two blocks


class Direction(Enum):
    UP = "upload"
    DOWN = "download"


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes between a host address and a device buffer."""

    address: int
    buffer: DeviceBuffer
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Job:
    handle: Handle
    copies: Sequence[Copy]
    after: Sequence[Handle]


class DeviceTransfer:
    """Copies in one direction. The first failure ends the copy it met, all that are queued and all later ones.

    Threads: `submit` and `close` from any, `close` last.
    """

    def __init__(self, direction: Direction, *, tracer: Tracer, clock: Clock) -> None:
        self._direction = direction
        self._move = DeviceBuffer.upload if direction is Direction.UP else DeviceBuffer.download
        self._tracer = tracer
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()  # guards the queue and the failure
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"pipo {direction.value}", daemon=True)
        self._thread.start()

    def submit(self, copies: Sequence[Copy], label: str, after: Sequence[Handle] = ()) -> Handle:
        """Queue copies that begin once `after` are done. Never blocks and never raises: the handle tells.

        Where one of `after` failed, the copy ends with its error.
        """
        num_bytes = sum(copy.num_bytes for copy in copies)
        handle = Handle(label, num_bytes=num_bytes, num_chunks=1, submitted_s=self._clock.now())
        with self._ready:
            failure = self._failure
            if failure is None:
                self._jobs.append(_Job(handle, copies, after))
                self._ready.notify()
                return handle
        handle.end_chunk(self._clock.now(), failure)
        return handle

    def close(self) -> None:
        """End what is queued as Cancelled and wait for the block that is under way. Closing again does nothing."""
        self._poison(Cancelled("the transfer was closed"))
        self._thread.join()

    def _poison(self, failure: BaseException) -> BaseException:
        """Keep the first failure, end every queued copy with it, and return it."""
        with self._ready:
            self._failure = self._failure or failure.with_traceback(None)
            first, dropped = self._failure, list(self._jobs)
            self._jobs.clear()
            self._ready.notify()
        for job in dropped:
            job.handle.end_chunk(self._clock.now(), first)
        return first

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            error: BaseException | None = None
            try:
                self._serve(job)
            except BaseException as failure:  # noqa: BLE001 - whoever waits for the handle hears of it
                error = self._poison(failure)
            job.handle.end_chunk(self._clock.now(), error)

    def _next_job(self) -> _Job | None:
        with self._ready:
            while not self._jobs and self._failure is None:
                self._ready.wait()
            return self._jobs.popleft() if self._failure is None else None

    def _serve(self, job: _Job) -> None:
        for handle in job.after:
            handle.wait_unless(self._has_failed)
        begin = self._clock.now()
        job.handle.begin_chunk(begin)
        for block in _blocks(job.copies):
            if self._has_failed():
                raise Cancelled("the transfer has ended")
            self._move(block.buffer, block.offset, block.address, block.num_bytes)
        end = self._clock.now()
        job.handle.end_read(job.handle.num_bytes, end)
        self._tracer.zone(self._direction.value, job.handle.label, begin, end)

    def _has_failed(self) -> bool:
        return self._failure is not None


def _blocks(copies: Sequence[Copy]) -> list[Copy]:
    return [
        Copy(copy.address + start, copy.buffer, copy.offset + start, min(BLOCK_BYTES, copy.num_bytes - start))
        for copy in copies
        for start in range(0, copy.num_bytes, BLOCK_BYTES)
    ]
