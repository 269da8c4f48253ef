"""Requests of an event loop that are answered elsewhere: on another thread, or in another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from pipo.base.errors import PipoError
from pipo.generation.answer import Piece
from pipo.generation.events import Cancel, Command, Embed, Embedding, Event, RequestId, Submit
from pipo.generation.request import GenerationRequest, Summary
from pipo.generation.waiting import DEFAULT_QUEUE, QueueSize

_Said = Piece | Summary | Embedding | PipoError


@dataclass(frozen=True, slots=True)
class _Open:
    prompt_tokens: int
    said: asyncio.Queue[_Said] = field(default_factory=asyncio.Queue)


class OpenRequests:
    """`ask` hands a command on to whoever answers, and does not wait. No more than `most` are open, those on their way
    included. Threads: the event loop's.
    """

    def __init__(self, ask: Callable[[Command], None], most: QueueSize = DEFAULT_QUEUE) -> None:
        self.most = most
        self._ask = ask
        self._ids = count()
        self._open: dict[RequestId, _Open] = {}
        self._error: PipoError | None = None  # nobody answers any more

    def __len__(self) -> int:
        return len(self._open)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece | Summary, None]:
        """Pieces as they are made, then the summary. Closing it cancels the request.

        Raises EngineBusy, and what ends it.
        """
        request_id = RequestId(next(self._ids))
        said = self._submit(Submit(request_id, request), request.prompt)
        try:
            while True:
                what = await said.get()
                if isinstance(what, PipoError):
                    raise what
                assert not isinstance(what, Embedding)
                yield what
                if isinstance(what, Summary):
                    return
        finally:
            self._leave(request_id)

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """Raises what ends it; cancelling the task cancels the request."""
        request_id = RequestId(next(self._ids))
        said = self._submit(Embed(request_id, prompt), prompt)
        try:
            what = await said.get()
            if isinstance(what, PipoError):
                raise what
            assert isinstance(what, Embedding)
            return what.vector
        finally:
            self._leave(request_id)

    def deliver(self, events: Sequence[Event]) -> None:
        """What was said; of requests that nobody waits for any more nothing is kept."""
        for request_id, what in events:
            asked = self._open.get(request_id)
            if asked is not None:
                asked.said.put_nowait(what)
                if not isinstance(what, Piece):
                    del self._open[request_id]

    def fail(self, error: PipoError) -> None:
        """Nobody answers any more: it ends all that are open and all that are to come."""
        self._error = error
        self.deliver([(request_id, error) for request_id in self._open])

    def _submit(self, command: Submit | Embed, prompt: Sequence[int]) -> asyncio.Queue[_Said]:
        if self._error is not None:
            raise self._error
        self.most.check(len(self._open), sum(each.prompt_tokens for each in self._open.values()), len(prompt))
        asked = self._open[command.request_id] = _Open(len(prompt))
        self._ask(command)
        return asked.said

    def _leave(self, request_id: RequestId) -> None:
        if self._open.pop(request_id, None) is not None:
            self._ask(Cancel(request_id))
