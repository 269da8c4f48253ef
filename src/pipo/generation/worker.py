"""A thread that computes, and iterators that read what it makes from another thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar, cast

from pipo.base.errors import Cancelled

T = TypeVar("T")
Stream = Generator[T, None, None]  # an iterator that can be closed


class _End:
    """Closes a stream, with the error it ended with."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Job(Generic[T]):
    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self.make = make
        self.is_abandoned = False
        self.out: queue.SimpleQueue[T | _End] = queue.SimpleQueue()


class Worker:
    """Runs one job at a time on its own thread. `interrupt` must make a running job end soon, until `resume`; both may
    be called from any thread. Threads: `stream` from one thread at a time.
    """

    def __init__(self, interrupt: Callable[[], None], resume: Callable[[], None]) -> None:
        self._interrupt = interrupt
        self._resume = resume
        self._is_closed = self._was_interrupted = False
        self._gate = threading.Lock()  # nothing is queued behind the end: guards `_is_closed` and what is put
        self._lock = threading.Lock()  # an interrupt goes to the job it is meant for: guards `_running`
        self._running: _Job[object] | None = None
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def stream(self, make: Callable[[], Iterator[T]]) -> Stream[T]:
        """Iterate on this thread over what `make()` yields on the worker's. Leaving early interrupts the job and
        waits until it has ended, so that the next one finds everything at rest. Raises Cancelled after `close`.
        """
        job, is_over = _Job(make), False
        with self._gate:
            if self._is_closed:
                raise Cancelled("the worker was closed")
            self._jobs.put(cast(_Job[object], job))  # the worker never looks into what it hands back
        try:
            while True:
                item = job.out.get()
                if isinstance(item, _End):
                    is_over = True
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            if not is_over:
                with self._lock:
                    job.is_abandoned = True
                    if self._running is job:
                        self.interrupt()
                while not isinstance(job.out.get(), _End):
                    pass

    def interrupt(self) -> None:
        """Make the job that runs end soon. Threads: any."""
        self._was_interrupted = True  # first: who clears the interrupt of a pass looks for it afterwards
        self._interrupt()

    @property
    def is_interrupted(self) -> bool:
        """The job that runs is to end, whatever it has made of what interrupted it."""
        return self._was_interrupted or self._is_closed

    def close(self) -> None:
        with self._gate:
            self._is_closed = True
            self._jobs.put(None)
        self._interrupt()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            error: BaseException | None = None
            with self._lock:
                # An interrupt from now on is this job's. One that came before belonged to an earlier job, or to
                # `close`, which the job looks for.
                self._running = job
                self._was_interrupted = False
                self._resume()
            try:
                if self._is_closed:
                    raise Cancelled("the worker was closed")
                for item in () if job.is_abandoned else job.make():
                    job.out.put(item)
            except BaseException as caught:  # noqa: BLE001 - handed to the thread that waits for it
                error = caught
            with self._lock:
                self._running = None
            job.out.put(_End(error))


class PassInterrupt:
    """Ends a pass of the job that runs, not the job. `set_flag` and `clear_flag` are of what the pass looks at.

    Threads: any.
    """

    def __init__(self, set_flag: Callable[[], None], clear_flag: Callable[[], None], worker: Worker) -> None:
        self.set = set_flag
        self._clear_flag = clear_flag
        self._worker = worker

    def clear(self) -> None:
        """Raises Cancelled where the job is to end: then clearing may have taken away what says so."""
        self._clear_flag()
        if self._worker.is_interrupted:
            raise Cancelled("stopped")
