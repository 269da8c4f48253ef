"""An engine of this process behind the contract: one request at a time, the others wait in a queue.

Its counters move when a request ends. It computes no embeddings and holds answers to no constraint.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from pipo.base.errors import Cancelled, EngineBusy, UsageError
from pipo.engine import Engine
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, Usage
from pipo.hardware.memory import PeakSampler
from pipo.pipeline.stats import PassStats
from pipo.serving.contract import EngineInfo, EngineStats, Summary

MAX_WAITING = 256
_END_S = 1.5
Progress = Callable[[str, float], None]
Started = tuple[Engine, EngineInfo]


@dataclass(slots=True)
class _Job:
    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    submitted_s: float
    out: asyncio.Queue[Piece | Summary | BaseException] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    def post(self, item: Piece | Summary | BaseException) -> None:
        """From any thread. A loop that is gone has nobody who waits."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)


class LocalEngine:
    """An EngineClient. `open` one, then `close` it. Threads: the event loop's."""

    def __init__(self, start: Callable[[Progress], Started], progress: Progress) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._start = start
        self._progress = progress
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # a cancellation goes to the job it is meant for: guards `_running`
        self._running: _Job | None = None
        self._num_waiting = 0
        self._engine: Engine | None = None
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._peak = PeakSampler()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)

    @classmethod
    async def open(cls, start: Callable[[Progress], Started], progress: Progress) -> LocalEngine:
        """`start` opens and starts an engine, on the thread that will ask it. Raises what it raises."""
        self = cls(start, progress)
        self._thread.start()
        try:
            await self._ready
        except asyncio.CancelledError:
            self._is_closed = True
            self._jobs.put(None)
            raise
        return self

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece | Summary, None]:
        _check(request)
        if self._num_waiting >= MAX_WAITING:
            raise EngineBusy(f"{self._num_waiting} requests wait already")
        job = _Job(request, asyncio.get_running_loop(), time.monotonic())
        self._num_waiting += 1
        self._jobs.put(job)
        is_over = False
        try:
            while not is_over:
                item = await job.out.get()
                is_over = not isinstance(item, Piece)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if not is_over:
                self._cancel(job)

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        raise UsageError("this engine computes no embeddings")

    async def stats(self) -> EngineStats:
        assert self._engine is not None
        return replace(
            self._stats,
            num_waiting=self._num_waiting,
            num_running=int(self._running is not None),
            ledger=self._engine.ledger_breakdown,
            limit_bytes=self.info.limit_bytes,
            anonymous_bytes=self._peak.sample(),
            peak_bytes=self._peak.peak_bytes,
        )

    async def close(self) -> None:
        self._is_closed = True
        if self._running is not None:
            self._cancel(self._running)
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, _END_S)

    def _cancel(self, job: _Job) -> None:
        job.is_cancelled = True
        with self._lock:
            if self._running is job and self._engine is not None:
                self._engine.cancel()

    def _run(self) -> None:
        try:
            self._engine, self._info = self._start(self._progress)
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the engine
            self._tell(partial(self._ready.set_exception, error))
            return
        self._tell(partial(self._ready.set_result, None))
        with closing(self._engine):
            while (job := self._jobs.get()) is not None:
                self._num_waiting -= 1
                with self._lock:
                    self._running = None if job.is_cancelled or self._is_closed else job
                job.post(self._answer(job) if self._running is job else Cancelled("the engine was closed"))
                with self._lock:
                    self._running = None

    def _tell(self, settle: Callable[[], None]) -> None:
        def unless_gone() -> None:
            if not self._ready.done():
                settle()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(unless_gone)

    def _answer(self, job: _Job) -> Summary | BaseException:
        """Pieces are posted as they come; what is returned is the last that is heard."""
        assert self._engine is not None
        request, begin_s = job.request, time.monotonic()

        def on_prefill(done: int, total: int) -> None:
            if job.is_cancelled:
                raise Cancelled("the request was cancelled")

        try:
            stream = self._engine.stream(request.prompt, request.params, on_prefill, adapters=request.adapters)
            with closing(stream) as pieces:
                for piece in pieces:
                    job.post(piece)
                    if job.is_cancelled:
                        break
        except BaseException as error:  # noqa: BLE001 - handed to who asked
            return error
        return self._summary(request, begin_s - job.submitted_s)

    def _summary(self, request: GenerationRequest, queued_s: float) -> Summary:
        report = self._engine.report if self._engine is not None else None
        assert report is not None
        timing, num_prompt = report.timing, len(request.prompt)
        self._stats = replace(
            _with_passes(self._stats, [report.prefill, report.decode]),
            prompt_tokens=self._stats.prompt_tokens + num_prompt,
            cached_tokens=self._stats.cached_tokens + timing.cached_tokens,
            completion_tokens=self._stats.completion_tokens + report.num_generated,
        )
        usage = Usage(num_prompt, report.num_generated, timing.cached_tokens)
        return Summary(usage, queued_s, queued_s + timing.ttft_s, timing.decode_s)


def _check(request: GenerationRequest) -> None:
    """Raises UsageError for what would be ignored."""
    if request.constraint is not None:
        raise UsageError(f"response_format {request.constraint.kind.value} is not supported by this engine")
    if request.params.logit_bias:
        raise UsageError("logit_bias is not supported by this engine")


def _with_passes(stats: EngineStats, passes: Sequence[PassStats]) -> EngineStats:
    stalls = dict(stats.stall_s)
    for each in passes:
        for cause, seconds in each.stall_s.items():
            stalls[cause.value] = stalls.get(cause.value, 0.0) + seconds
    return replace(
        stats,
        num_passes=stats.num_passes + sum(each.num_passes for each in passes),
        bytes_read=stats.bytes_read + sum(each.bytes_read for each in passes),
        compute_s=stats.compute_s + sum(each.compute_s for each in passes),
        wall_s=stats.wall_s + sum(each.wall_s for each in passes),
        stall_s=stalls,
    )
