"""What an answer's text means: words for the reader, thoughts before them, calls of tools.

The formats by which models write calls and thoughts are the text package's. This is the one place of the server that
asks for them: what may be called, what an answer is held to, how it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipo.generation.request import ConstraintSpec, GenerationRequest, SamplingParams
from pipo.server.errors import invalid
from pipo.server.prompts import Encoded, Prompts

ToolDict = Mapping[str, object]  # as OpenAI writes it, and as templates read it: {"type": "function", "function": {…}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class AnswerDelta:
    """What a piece of the answer adds: thoughts, then text, then calls."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class AnswerReader(Protocol):
    """Reads one answer as it comes. Threads: one."""

    def feed(self, text: str) -> AnswerDelta: ...

    def finish(self) -> AnswerDelta:
        """The rest: the answer has ended."""


class PlainReader:
    """All text is for the reader."""

    def feed(self, text: str) -> AnswerDelta:
        return AnswerDelta(text)

    def finish(self) -> AnswerDelta:
        return AnswerDelta()


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools there are, and whether one must be called: `mode` is auto, none, required, or a tool's name."""

    tools: Sequence[ToolDict] = ()
    mode: str = "auto"
    is_parallel: bool = True

    @property
    def shown(self) -> Sequence[ToolDict] | None:
        """What the template is told of."""
        return self.tools if self.tools and self.mode != "none" else None


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one request are read, and what they are held to. `make` takes the prompt's last words, which
    tell whether the answer begins with thoughts.
    """

    make: Callable[[str], AnswerReader]
    constraint: ConstraintSpec | None = None

    def request(self, prompt: Encoded, params: SamplingParams, adapters: str | None) -> GenerationRequest:
        return GenerationRequest(prompt.ids, params, adapters, self.constraint)


def reading_of(prompts: Prompts, choice: ToolChoice, constraint: ConstraintSpec | None = None) -> Reading:
    """`constraint` is what the request itself asks for. Raises ApiError where both cannot be, or no tool can."""
    if choice.shown:
        raise invalid("tools are not supported with this model", "tools", "unsupported_field")
    return Reading(lambda tail: PlainReader(), constraint)
