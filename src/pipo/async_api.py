"""The Python API for programs with an event loop.

async with pipo.AsyncLLM("model.gguf", ram="4GB", num_sequences=8) as llm:
    async for piece in llm.stream("Once upon a time"):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pipo.api import load
from pipo.base.errors import Cancelled, EngineDied, PipoError, UsageError
from pipo.generation.answer import Piece, completion_of
from pipo.generation.events import Cancel, Command, Event
from pipo.generation.inbox import CommandQueue
from pipo.generation.open_requests import OpenRequests
from pipo.generation.request import Completion, GenerationRequest, SamplingParams, Summary
from pipo.generation.waiting import DEFAULT_QUEUE
from pipo.text.chat_template import Message

Adapters = str | Mapping[str, float] | None
T = TypeVar("T")
ASKED_PER_SEQUENCE = 2  # of many prompts: as one ends the next one waits already


class AsyncLLM:
    """Answers to prompts that come at any time, of which `num_sequences` share every sweep of the weights.

    Opening it takes as long as `load` does, and blocks meanwhile. Threads: those of one event loop; the model computes
    on its own, which slows down beside a busy interpreter: `pipo.serving` has engines in processes of their own.
    """

    def __init__(self, model: str | Path, ram: str | int = "auto", **settings: object) -> None:
        self.engine = load(model, ram, **settings)
        self._inbox = CommandQueue()
        assert self.engine.plan is not None
        num_sequences, context_tokens = self.engine.config.num_sequences, self.engine.plan.context_tokens
        self._open = OpenRequests(self._ask, DEFAULT_QUEUE.beside(num_sequences, context_tokens))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="serve", daemon=True)

    async def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | None = None, *, adapters: Adapters = None
    ) -> list[Completion]:
        """One answer per prompt; a single string is one prompt. `adapters` says which of the loaded ones all of them
        have. Raises UsageError, ContextOverflow, EngineBusy, TransferError, ComputeError, Cancelled.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        return await self._complete([self.engine.encode(text) for text in texts], params, adapters)

    async def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapters: Adapters = None,
    ) -> list[Completion]:
        """The same for conversations."""
        return await self._complete([self.engine.encode_chat(each) for each in conversations], params, adapters)

    def stream(
        self, prompt: str | Sequence[Message], params: SamplingParams | None = None, *, adapters: Adapters = None
    ) -> AsyncGenerator[Piece, None]:
        """The answer to plain text, or to a conversation, as it is made. Closing the iterator cancels it."""
        ids = self.engine.encode(prompt) if isinstance(prompt, str) else self.engine.encode_chat(prompt)
        return self._pieces(GenerationRequest(ids, params or SamplingParams(), adapters))

    async def _pieces(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        async with aclosing(self._answer(request)) as answer:
            async for what in answer:
                if isinstance(what, Piece):
                    yield what

    async def _complete(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | None, adapters: Adapters
    ) -> list[Completion]:
        few = asyncio.Semaphore(ASKED_PER_SEQUENCE * self.engine.config.num_sequences)
        requests = [GenerationRequest(prompt, params or SamplingParams(), adapters) for prompt in prompts]
        tasks = [asyncio.ensure_future(self._completion(request, few)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:  # one failed, or the caller was cancelled: nobody wants the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _completion(self, request: GenerationRequest, few: asyncio.Semaphore) -> Completion:
        pieces: list[Piece] = []
        async with few, aclosing(self._answer(request)) as answer:
            async for what in answer:
                if isinstance(what, Summary):
                    return completion_of(request.prompt, pieces, what.usage.cached_tokens)
                pieces.append(what)
        raise AssertionError("an answer ends with a summary or an error")

    def _answer(self, request: GenerationRequest) -> AsyncGenerator[Piece | Summary, None]:
        self._start()
        return self._open.stream(request)

    def _start(self) -> None:
        """With the first request, in the loop that asks."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        elif self._loop is not asyncio.get_running_loop():
            raise UsageError("an AsyncLLM serves one event loop", hint="open another in the other loop")

    def _ask(self, command: Command) -> None:
        self._inbox.put([command])
        if isinstance(command, Cancel):
            self.engine.batcher.cancel(command.request_id)  # at once, where only its pass is in the way

    def _serve(self) -> None:
        error: PipoError = Cancelled("the engine was closed")
        try:
            self.engine.serve(self._inbox, self._deliver)
        except PipoError as caught:
            error = caught
        except BaseException as caught:
            error = EngineDied(f"the thread that computes has ended: {caught!r}")
            raise
        finally:
            self._call(self._open.fail, error)

    def _deliver(self, events: Sequence[Event]) -> None:
        if events:
            self._call(self._open.deliver, events)

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        """In the event loop, unless that has gone."""
        assert self._loop is not None
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)

    async def close(self) -> None:
        """Stop, and give every byte back. What is open ends with Cancelled. Closing again does nothing."""
        self._inbox.close()
        await asyncio.to_thread(self.engine.close)
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
