"""The answers of one HTTP request as they grow: one or several sequences, until the last has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex

from pipo.generation.answer import Piece
from pipo.generation.request import FinishReason, GenerationRequest, Usage
from pipo.server.errors import ApiError, Fault
from pipo.server.service import Service, Stoppable
from pipo.serving.contract import EngineClient, Summary

_MAX_AHEAD = 64  # pieces that wait for a slow reader; then its sequences wait


@dataclass(frozen=True, slots=True)
class Growth:
    """What one sequence, by its index, has more."""

    index: int
    item: Piece | Summary


@dataclass(frozen=True, slots=True)
class _Ended:
    """A sequence is over; with the error that ended it."""

    error: Exception | None = None


class Answers:
    """Asks the engine for each of `requests`. `fail` ends them, from the event loop."""

    def __init__(self, service: Service, requests: Sequence[GenerationRequest]) -> None:
        self._service = service
        self._requests = requests
        self._failure: ApiError | None = None
        self._queue: asyncio.Queue[Growth | _Ended] = asyncio.Queue(_MAX_AHEAD)

    def fail(self, error: ApiError) -> None:
        """Whoever reads gets this error next."""
        self._failure = self._failure or error
        with suppress(asyncio.QueueFull):  # then the reader looks soon
            self._queue.put_nowait(_Ended())

    async def grow(self) -> AsyncGenerator[Growth, None]:
        """Pieces and summaries of all sequences as they come. Closing it cancels what still runs.

        Raises ApiError, and what the engine raises.
        """
        engine = self._service.engine
        done = _watched(self._service, self)
        feeders = [
            asyncio.ensure_future(self._feed(engine, index, request)) for index, request in enumerate(self._requests)
        ]
        try:
            num_left = len(feeders)
            while num_left:
                growth = await self._queue.get()
                if self._failure is not None:
                    raise self._failure
                if isinstance(growth, Growth):
                    yield growth
                    continue
                if growth.error is not None:
                    raise growth.error
                num_left -= 1
        finally:
            done()
            for feeder in feeders:
                feeder.cancel()
            await asyncio.gather(*feeders, return_exceptions=True)

    async def _feed(self, engine: EngineClient, index: int, request: GenerationRequest) -> None:
        stream = engine.stream(request)
        try:
            async for item in stream:
                if isinstance(item, Summary):
                    self._service.metrics.note(item)
                await self._queue.put(Growth(index, item))
        except Exception as error:  # noqa: BLE001 - handed to whoever reads
            await self._queue.put(_Ended(error))
        else:
            await self._queue.put(_Ended())
        finally:
            await _close(stream)


class Embeddings:
    """Asks the engine for the vector of each prompt, one by one: it orders them. `fail` ends it."""

    def __init__(self, service: Service, prompts: Sequence[Sequence[int]]) -> None:
        self._service = service
        self._prompts = prompts
        self._failure: asyncio.Future[list[list[float]]] = asyncio.get_running_loop().create_future()

    def fail(self, error: ApiError) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def vectors(self) -> list[list[float]]:
        """Raises ApiError, and what the engine raises."""
        engine = self._service.engine
        done = _watched(self._service, self)
        asking = asyncio.ensure_future(self._ask(engine))
        try:
            await asyncio.wait({asking, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            return (self._failure if self._failure.done() else asking).result()
        finally:
            done()
            asking.cancel()
            self._failure.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask(self, engine: EngineClient) -> list[list[float]]:
        return [await engine.embed(ids) for ids in self._prompts]


def _watched(service: Service, work: Stoppable) -> Callable[[], None]:
    """It fails where it takes longer than a request may, or the server ends. Returns what to call when it is over."""
    seconds = service.settings.limits.max_request_s
    forget = service.begin(work)
    late = ApiError(Fault.OUT_OF_TIME, f"the answer was not finished within {seconds:g} s")
    deadline = asyncio.get_running_loop().call_later(seconds, work.fail, late)

    def done() -> None:
        deadline.cancel()
        forget()

    return done


async def _close(stream: AsyncIterator[Piece | Summary]) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()


class UsageSum:
    """Tokens of all answers to a request; answers to the same prompt count it once."""

    def __init__(self, num_per_prompt: int) -> None:
        self._num_per_prompt = num_per_prompt
        self._usages: dict[int, Usage] = {}

    def take(self, index: int, summary: Summary) -> None:
        self._usages[index] = summary.usage

    @property
    def total(self) -> Usage:
        firsts = [usage for index, usage in self._usages.items() if index % self._num_per_prompt == 0]
        return Usage(
            sum(usage.prompt_tokens for usage in firsts),
            sum(usage.completion_tokens for usage in self._usages.values()),
            sum(usage.cached_tokens for usage in firsts),
        )


def openai_head(service: Service, model: str | None, prefix: str, kind: str) -> dict[str, object]:
    """What every answer of one request begins with, and every event of its stream."""
    return {
        "id": f"{prefix}-{token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model or service.settings.name,
        "system_fingerprint": service.fingerprint(),
    }


def openai_usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finish_text(finish: FinishReason | None, has_calls: bool = False) -> str:
    """OpenAI's word."""
    if finish is FinishReason.CANCELLED or finish is None:
        raise ApiError(Fault.BROKEN, "the engine ended an answer without a reason")
    return "tool_calls" if has_calls and finish is FinishReason.STOP else finish.value
