"""An engine in a process of its own, as the asking process sees it."""

from __future__ import annotations

import asyncio
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pipo
from pipo.base.errors import Cancelled, EngineDied, PipoError
from pipo.generation.answer import Piece
from pipo.generation.events import Command
from pipo.generation.open_requests import OpenRequests
from pipo.generation.request import GenerationRequest, Summary
from pipo.generation.waiting import DEFAULT_QUEUE
from pipo.hardware.memory import PeakSampler
from pipo.hardware.probe import Progress
from pipo.serving.contract import EngineInfo, EngineStats
from pipo.serving.wire import Asked, EngineSetup, Failed, Progressed, Said, Started, StatsWanted, Wire

T = TypeVar("T")
CLOSE_S = 15.0  # that the engine's process has to end by itself, which gives up after 10
_MAIN = "from pipo.serving.process import main; main()"


async def open_engine(setup: EngineSetup, on_progress: Progress = lambda step, fraction: None) -> ProcessEngine:
    """Start an engine; `on_progress` hears how far measuring the machine is, where that is needed.

    Raises what starting it raises, as the same types: OverBudget, ModelError, UsageError, TransferError; EngineDied
    where its process ends without a word. Cancelling the task ends the process.
    """
    engine = ProcessEngine(setup, on_progress)
    try:
        await engine.wait_started()
    except BaseException:
        await asyncio.shield(engine.kill())
        raise
    return engine


class ProcessEngine:
    """A ServedEngine. Threads: those of one event loop; two of its own read and write the pipes."""

    def __init__(self, setup: EngineSetup, on_progress: Progress) -> None:
        """Starts the process; `open_engine` waits for it, too."""
        self._loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self._peak = PeakSampler()
        self._info: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._stats: list[asyncio.Future[EngineStats]] = []
        self._error: PipoError | None = None  # that it ended with
        self._has_ended = asyncio.Event()
        self._process = _spawn()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._wire = Wire(self._process.stdout, self._process.stdin)
        self._outbox: queue.SimpleQueue[EngineSetup | Command | StatsWanted | None] = queue.SimpleQueue()
        self._outbox.put(setup)
        self._open = OpenRequests(self._outbox.put)
        for target in (self._read, self._write):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    async def wait_started(self) -> None:
        """Raises what starting it raises."""
        await asyncio.shield(self._info)

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def info(self) -> EngineInfo:
        return self._info.result()

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece | Summary, None]:
        """Pieces as they are made, then the summary. Closing the iterator cancels the request.

        Raises UsageError, ContextOverflow, EngineBusy; TransferError, ComputeError, Cancelled, EngineDied.
        """
        return self._open.stream(request)

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """Of length 1. Raises as `stream`."""
        return await self._open.embed(prompt)

    async def stats(self) -> EngineStats:
        """Memory is that of both processes. Raises EngineDied, Cancelled where there is no engine any more."""
        if self._error is not None:
            raise self._error
        answer: asyncio.Future[EngineStats] = self._loop.create_future()
        self._stats.append(answer)
        self._outbox.put(StatsWanted())
        theirs = await answer
        ours = self._peak.sample()
        return replace(
            theirs,
            anonymous_bytes=theirs.anonymous_bytes + ours,
            peak_bytes=theirs.peak_bytes + self._peak.peak_bytes,
        )

    async def ended(self) -> PipoError:
        """Waits until the process has ended: why it did, of itself or because it was closed."""
        await self._has_ended.wait()
        assert self._error is not None
        return self._error

    async def close(self) -> None:
        """End the process; what is open ends with Cancelled. Closing again does nothing."""
        self._end(Cancelled("the engine was closed"))
        self._outbox.put(None)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_ended.wait(), CLOSE_S)
        await self.kill()

    async def kill(self) -> None:
        """Without waiting for what it does."""
        self._outbox.put(None)
        if not self._has_ended.is_set():
            self._process.kill()
            await self._has_ended.wait()

    def _end(self, error: PipoError) -> None:
        """All that is open, and all that is to come. The first error stays."""
        if self._error is not None:
            return
        self._error = error
        self._open.fail(error)
        for answer in self._stats:
            if not answer.done():
                answer.set_exception(error)
        self._stats.clear()
        if not self._info.done():
            self._info.set_exception(error)
            self._info.exception()  # else asyncio complains where nobody waits for it any more

    def _take(self, message: object) -> None:
        if isinstance(message, Said):
            self._open.deliver(message.events)
        elif isinstance(message, EngineStats):
            if self._stats:
                _set(self._stats.pop(0), message)
        elif isinstance(message, Progressed):
            self._on_progress(message.step, message.fraction)
        elif isinstance(message, Started):
            self._open.most = DEFAULT_QUEUE.beside(message.info.num_sequences, message.info.context_tokens)
            _set(self._info, message.info)
        elif isinstance(message, Failed):
            self._end(message.error)

    def _take_end(self, code: int) -> None:
        self._end(EngineDied(f"the engine's process has ended ({_how(code)})", hint=_hint(code)))
        self._has_ended.set()

    def _read(self) -> None:
        """Until the process has ended, which this waits for: it leaves no zombie."""
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self._call(self._take, self._wire.receive())
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._outbox.put(None)  # the thread that writes
        self._call(self._take_end, code)

    def _write(self) -> None:
        """Commands that have gathered while the last ones were sent go together."""
        try:
            while True:
                first = self._outbox.get()
                waiting = [first, *(self._outbox.get() for _ in range(self._outbox.qsize()))]
                commands = tuple(each for each in waiting if isinstance(each, Command))
                if isinstance(first, EngineSetup):
                    self._wire.send(first)
                if commands:
                    self._wire.send(Asked(commands))
                for each in waiting:
                    if isinstance(each, StatsWanted):
                        self._wire.send(each)
                if None in waiting:
                    break
        except OSError:
            pass  # it has ended, and the thread that reads says so
        self._wire.close()

    def _call(self, function: Callable[..., None], argument: object) -> None:
        """In the event loop, unless that has gone."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)


def _set(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _spawn() -> subprocess.Popen[bytes]:
    """A fresh interpreter, which takes nothing of this one but where pipo is."""
    root = str(Path(pipo.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _hint(code: int) -> str | None:
    if code == -signal.SIGKILL:
        return "where nobody killed it, the kernel did for want of memory: give it less with --ram"
    return None
