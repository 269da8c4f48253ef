"""The loop of the thread that answers: take what was asked for, make a pass, say what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipo.base.errors import Cancelled, PipoError
from pipo.generation.adapters import AdapterSet
from pipo.generation.batcher import Batcher
from pipo.generation.events import Cancel, Command, Event, Submit
from pipo.generation.inbox import Inbox
from pipo.pipeline.adapters import Weights


class RequestLoop:
    """`weights_of` says which adapters a request has. Threads: one."""

    def __init__(self, batcher: Batcher, weights_of: Callable[[AdapterSet], Weights]) -> None:
        self._batcher = batcher
        self._weights_of = weights_of
        self._is_open = False  # more may come

    def run(self, inbox: Inbox) -> Iterator[list[Event]]:
        """What was said of whom, pass by pass, until all have been answered and nothing more will come. What ends the
        loop ends all requests with it. Raises Cancelled where everything was to end.
        """
        batcher = self._batcher
        self._is_open = True
        try:
            while self._is_open or not batcher.is_idle:
                events = self._take_all(inbox)
                yield events + batcher.step()
        except Cancelled as error:
            yield batcher.drop_all(error)
            raise
        finally:
            batcher.drop_all(Cancelled("whoever asked has gone"))

    def _take_all(self, inbox: Inbox) -> list[Event]:
        """Do what has come, so that a pass has all there is room for, or up to a refusal, which is said at once. Waits
        where there is nothing else to do.
        """
        events: list[Event] = []
        while self._is_open and not events and (commands := inbox.take(waits=self._batcher.is_idle)) != []:
            self._is_open = commands is not None
            events += [event for command in commands or () for event in self._do(command)]
        return events

    def _do(self, command: Command) -> Iterator[Event]:
        """What is refused ends at once."""
        batcher, request_id = self._batcher, command.request_id
        try:
            if isinstance(command, Cancel):
                batcher.cancel(request_id)
            elif isinstance(command, Submit):
                batcher.submit(request_id, command.request, self._weights_of(command.request.adapters))
            else:
                batcher.submit_embedding(request_id, command.prompt, self._weights_of(None))
        except PipoError as error:
            yield request_id, error
