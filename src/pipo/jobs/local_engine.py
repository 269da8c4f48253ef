"""An EngineClient over an engine in this process, for as long as there is none in a process of its own.

Requests that wait are answered together, as many as the engine has sequences; others wait until those have ended.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pipo.answering import Report
from pipo.base.errors import Cancelled, UsageError
from pipo.engine import Engine
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, Usage
from pipo.hardware.memory import process_memory
from pipo.jobs.engine_plan import EngineSpec
from pipo.model_file import ModelFile
from pipo.serving.contract import EngineInfo, EngineStats, Summary


@dataclass(slots=True)
class _Waiting:
    request: GenerationRequest
    out: asyncio.Queue[Piece | Summary | BaseException] = field(default_factory=asyncio.Queue)
    num_tokens: int = 0
    is_cancelled: bool = False


class LocalEngine:
    """Threads: an event loop's; it computes on its own."""

    def __init__(self, spec: EngineSpec) -> None:
        """Raises OverBudget, ModelError."""
        self._engine = Engine(ModelFile(spec.model), spec.config)
        try:
            self._engine.start(self._engine.make_plan(spec.context_tokens, workload=spec.workload))
        except BaseException:
            self._engine.close()
            raise
        plan = self._engine.plan
        assert plan is not None
        name = self._engine.model.manifest.name
        self._info = EngineInfo(name, plan.context_tokens, spec.config.num_sequences, plan.limit_bytes)
        self._stats = EngineStats(limit_bytes=plan.limit_bytes)
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="batches", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Piece | Summary]:
        if request.constraint is not None:
            raise UsageError("this engine has no constraints")
        waiting = _Waiting(request)
        self._queue.put(waiting)
        try:
            while True:
                found = await waiting.out.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
                if isinstance(found, Summary):
                    return
        finally:
            waiting.is_cancelled = True

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        raise UsageError("this engine has no embeddings")

    async def stats(self) -> EngineStats:
        return replace(self._stats, anonymous_bytes=process_memory().anonymous_bytes)

    async def close(self) -> None:
        self._queue.put(None)
        self._engine.cancel()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._engine.close)

    def _serve(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < self._info.num_sequences and not self._queue.empty():
                waiting = self._queue.get()
                if waiting is None:
                    self._queue.put(None)
                    break
                batch.append(waiting)
            try:
                self._answer([each for each in batch if not each.is_cancelled])
            except BaseException as error:  # noqa: BLE001 - handed to those who wait
                for each in batch:
                    self._send(each, error)

    def _answer(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        for i, piece in self._pieces(batch):
            batch[i].num_tokens += piece.token is not None
            self._send(batch[i], piece)
            if piece.finish is not None:
                usage = Usage(len(batch[i].request.prompt), batch[i].num_tokens)
                self._send(batch[i], Summary(usage, 0.0, 0.0, 0.0))
        if self._engine.report is not None:
            self._count(self._engine.report)

    def _pieces(self, batch: list[_Waiting]) -> Iterator[tuple[int, Piece]]:
        requests = [each.request for each in batch]
        if self._info.num_sequences == 1:
            return ((0, piece) for piece in self._engine.stream(requests[0].prompt, requests[0].params))
        return self._engine.stream_batch([each.prompt for each in requests], [each.params for each in requests])

    def _send(self, waiting: _Waiting, what: Piece | Summary | BaseException) -> None:
        if not waiting.is_cancelled:
            error = Cancelled("the engine was closed") if isinstance(what, Cancelled) else what
            self._loop.call_soon_threadsafe(waiting.out.put_nowait, error)

    def _count(self, report: Report) -> None:
        stats = self._stats
        for part in (report.prefill, report.decode):
            stats = replace(
                stats,
                num_passes=stats.num_passes + part.num_passes,
                bytes_read=stats.bytes_read + part.bytes_read,
                compute_s=stats.compute_s + part.compute_s,
                wall_s=stats.wall_s + part.wall_s,
            )
        self._stats = stats
