"""What an answer is taken apart into, and how markers are found in text that comes in pieces."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipo.text.call_bodies import ReadCall

_ID_LETTERS = string.ascii_letters + string.digits


State = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as OpenAI's API gives it: `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class AnswerDelta:
    """What a piece of the answer adds. Empty where it may yet become part of a marker or a call."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class StateReader:
    """Reads an answer piece by piece: a state takes text, adds to `_out`, and gives back what the next one is to read.
    None: all was taken, or waits in `_held` for what may make a marker of it.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._held = ""
        self._body: list[str] = []  # of a call, in pieces
        self._out = AnswerDelta()

    def feed(self, text: str) -> AnswerDelta:
        self._out = AnswerDelta()
        rest: str | None = text
        while rest:
            rest = self._state(rest)
        return self._out

    def finish(self) -> AnswerDelta:
        self._out = AnswerDelta()
        held, self._held = self._held, ""
        self._end(held)
        return self._out

    def _end(self, held: str) -> None:
        """The answer has ended, with this held back."""
        raise AssertionError("a reader says how it ends")


def make_call(read: ReadCall, id_chars: int | None) -> ToolCall:
    """With the model's id, or a random one."""
    call_id = read.id
    if call_id is None and id_chars is not None:
        call_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(id_chars))
    return ToolCall(
        call_id or f"call_{secrets.token_hex(12)}", read.name, json.dumps(read.arguments, ensure_ascii=False)
    )


def partial_length(text: str, markers: Sequence[str]) -> int:
    """Characters at the end of `text` that a marker may begin with."""
    longest = min(len(text), max((len(marker) for marker in markers), default=1) - 1)
    sizes = (n for n in range(longest, 0, -1) if any(marker.startswith(text[-n:]) for marker in markers))
    return next(sizes, 0)


def find_first(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of the markers stands, and which one."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found, default=None)
