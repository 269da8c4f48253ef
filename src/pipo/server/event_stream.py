"""Server-sent events with a sign of life when nothing else is to be said.

Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipo.server.errors import ApiError, api_error_of

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # a proxy must not collect them
OPENAI_PING = b": ping\n\n"
OPENAI_DONE = b"data: [DONE]\n\n"


def data_event(data: object) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def named_event(name: str, data: object) -> bytes:
    return f"event: {name}\n".encode() + data_event(data)


Events = AsyncGenerator[bytes, None]


async def open_stream(
    events: Events, *, ping: bytes, ping_s: float, error_event: Callable[[ApiError], bytes]
) -> EventStream:
    """Wait for the first event, but no longer than for a ping: what fails before it is an answer with a status of
    its own. Raises what `events` raises.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        done, _ = await asyncio.wait({first}, timeout=ping_s)
        if done:
            first.result()
    except BaseException:
        await _abandon(first, events)
        raise
    return EventStream(events, first, ping, ping_s, error_event)


async def _abandon(pending: asyncio.Future[bytes], events: Events) -> None:
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await events.aclose()


class EventStream(Response):
    """Sends events as they come. Whoever leaves closes `events`."""

    def __init__(
        self,
        events: Events,
        first: asyncio.Future[bytes],
        ping: bytes,
        ping_s: float,
        error_event: Callable[[ApiError], bytes],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._first = first
        self._ping, self._ping_s = ping, ping_s
        self._error_event = error_event
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pinger = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            pinger = asyncio.ensure_future(self._keep_alive(send))
            async for event in self._all():
                self._sent_at = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            if pinger is not None:
                pinger.cancel()
                await asyncio.gather(pinger, return_exceptions=True)
            await _abandon(self._first, self._events)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _all(self) -> Events:
        """An error ends them, as the last event."""
        try:
            with suppress(StopAsyncIteration):
                yield await self._first
            async for event in self._events:
                yield event
        except Exception as error:  # noqa: BLE001 - told to the client: the status was sent long ago
            yield self._error_event(api_error_of(error))

    async def _keep_alive(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        self._sent_at = now()
        while True:
            await asyncio.sleep(max(self._sent_at + self._ping_s - now(), 0.01))
            if now() >= self._sent_at + self._ping_s:
                self._sent_at = now()
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})
