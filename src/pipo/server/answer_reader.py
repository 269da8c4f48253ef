"""What an answer's text means: words for the reader, thoughts before them, calls of tools.

The formats by which models write calls and thoughts are the text package's; this is all that the server asks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipo.generation.request import ConstraintSpec
from pipo.server.errors import invalid
from pipo.server.prompts import Prompts

Tool = Mapping[str, object]  # as OpenAI writes it, and as templates read it: {"type": "function", "function": {…}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` are the JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Part:
    """One of them is there."""

    text: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class AnswerReader(Protocol):
    """Reads one answer as it comes. Threads: one."""

    def feed(self, text: str) -> Sequence[Part]: ...

    def end(self) -> Sequence[Part]:
        """No more text will come: what was held back."""


class PlainReader:
    """All text is for the reader."""

    def feed(self, text: str) -> Sequence[Part]:
        return (Part(text),) if text else ()

    def end(self) -> Sequence[Part]:
        return ()


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools there are, and whether one must be called: `mode` is auto, none, required, or a tool's name."""

    tools: Sequence[Tool] = ()
    mode: str = "auto"
    is_parallel: bool = True


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one request are read, and what they are held to."""

    make: Callable[[], AnswerReader]
    constraint: ConstraintSpec | None = None


def reading_of(prompts: Prompts, choice: ToolChoice) -> Reading:
    """Raises ApiError where the model's template knows no tools."""
    if choice.tools and choice.mode != "none":
        raise invalid("tools are not supported with this model", "tools", "unsupported_field")
    return Reading(PlainReader)
