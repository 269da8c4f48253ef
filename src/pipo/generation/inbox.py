"""Where requests come from: a program that has them all, or threads that ask while others are answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pipo.generation.events import Command, RequestId, Submit
from pipo.generation.request import GenerationRequest


class Inbox(Protocol):
    """Threads: `take` from the one that answers."""

    def take(self, *, waits: bool) -> Sequence[Command] | None:
        """What was asked for since the last time; with `waits` not before there is something. None: nothing more will
        come.
        """


class Iterated:
    """Requests numbered in their order, each taken when `has_room` for it."""

    def __init__(self, requests: Iterable[GenerationRequest], has_room: Callable[[], bool]) -> None:
        self._requests = enumerate(requests)
        self._has_room = has_room

    def take(self, *, waits: bool) -> Sequence[Command] | None:
        """One at most: whether there is room for another shows afterwards."""
        if not self._has_room():
            return []
        following = next(self._requests, None)
        return None if following is None else [Submit(RequestId(following[0]), following[1])]


class CommandQueue:
    """Threads: any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._is_closed = False

    def put(self, commands: Sequence[Command]) -> None:
        with self._changed:
            self._commands += commands
            self._changed.notify()

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def take(self, *, waits: bool) -> Sequence[Command] | None:
        with self._changed:
            while waits and not self._commands and not self._is_closed:
                self._changed.wait()
            if self._is_closed and not self._commands:
                return None
            taken, self._commands = self._commands, []
            return taken
