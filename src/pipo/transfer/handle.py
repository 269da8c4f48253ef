"""One asynchronous move and how it ended: every handle ends in success or in a stored error."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipo.base.errors import Cancelled

_WAKE_S = 0.1  # how often a wait looks whether it should end


class Handle:
    """The caller's side of a transfer. Once `is_done`, nothing writes to its place any more.

    Times are seconds of the transfer's clock, None until they happened: `submitted_s`, `started_s` (a worker took the
    first chunk), `read_s` (the last byte so far arrived from the drive), `finished_s`. `num_bytes` were asked for,
    `read_bytes` came from the drive, alignment included.
    Threads: any.
    """

    def __init__(self, label: str, *, num_bytes: int, num_chunks: int, submitted_s: float) -> None:
        self.label = label
        self.num_bytes = num_bytes
        self.num_chunks = num_chunks
        self.read_bytes = 0
        self.submitted_s = submitted_s
        self.started_s: float | None = None
        self.read_s: float | None = None
        self.finished_s: float | None = None
        self._chunks_left = num_chunks
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not num_chunks:
            self._finish(submitted_s)

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the transfer is done or `timeout_s` has passed: ask `is_done` which.

        Raises the stored error (TransferError, Cancelled) of a transfer that failed, on every call.
        """
        if self._done.wait(timeout_s) and self._error is not None:
            raise self._error.with_traceback(None)  # else each wait would grow the traceback and keep its frames

    def wait_unless(self, is_stopped: Callable[[], bool]) -> None:
        """Return when the transfer is done. Raises its stored error, and Cancelled soon after `is_stopped` says so."""
        while not self.is_done:
            self.wait(_WAKE_S)
            if is_stopped():
                raise Cancelled(f"stopped while waiting for {self.label}")
        self.wait(0)

    def begin_chunk(self, now_s: float) -> None:
        """For transfers: a worker took a chunk."""
        if self.started_s is None:
            self.started_s = now_s

    def end_read(self, read_bytes: int, now_s: float) -> None:
        """For transfers: the bytes of a chunk arrived; its end_chunk follows."""
        with self._lock:
            self.read_bytes += read_bytes
            self.read_s = now_s

    def end_chunk(self, now_s: float, error: BaseException | None = None) -> None:
        """For transfers: a chunk is in its place, or will never be. The last one completes the handle."""
        with self._lock:
            self._error = self._error or error
            self._chunks_left -= 1
            assert self._chunks_left >= 0
            if not self._chunks_left:
                self._finish(now_s)

    def abandon(self, now_s: float, error: BaseException) -> None:
        """For transfers that cannot wait: end now, although a stuck read may still write to the place."""
        with self._lock:
            if not self._done.is_set():
                self._error = self._error or error
            self._finish(now_s)

    def _finish(self, now_s: float) -> None:
        if not self._done.is_set():  # else it was abandoned, and the stuck read came back after all
            self.finished_s = now_s
            self._done.set()
