"""What an answer's text means: words for the reader, thoughts before them, calls of tools.

The formats by which models write calls and thoughts are the text package's. This is the one place of the server that
asks for them: what may be called, what an answer is held to, how it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipo.generation.request import ConstraintKind, ConstraintSpec, GenerationRequest, SamplingParams
from pipo.server.errors import invalid
from pipo.server.prompts import Encoded, Prompts
from pipo.text.answer_formats import AnswerFormat, Tool, hidden_markers, read_tools
from pipo.text.answer_parts import AnswerDelta, ToolCall
from pipo.text.call_grammar import call_grammar, forced_format
from pipo.text.tool_calls import AnswerReader, answer_reader

ToolDict = Mapping[str, object]  # as OpenAI writes it, and as templates read it

__all__ = ["AnswerDelta", "AnswerReader", "Reading", "ToolCall", "ToolChoice", "ToolDict", "reading_of"]


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
    tell whether the answer begins with thoughts; `shown` are control tokens whose text it needs.
    """

    make: Callable[[str], AnswerReader]
    constraint: ConstraintSpec | None = None
    shown: frozenset[int] = frozenset()

    def request(self, prompt: Encoded, params: SamplingParams, adapters: str | None) -> GenerationRequest:
        return GenerationRequest(prompt.ids, params, adapters, self.constraint, self.shown)


def reading_of(prompts: Prompts, choice: ToolChoice, constraint: ConstraintSpec | None = None) -> Reading:
    """`constraint` is what the request itself asks for. Raises ApiError where an answer cannot be both."""
    format, tools = prompts.answer_format, read_tools(choice.shown or ())
    if tools and choice.mode != "auto":
        if constraint is not None:
            raise invalid("a format of the answer and a tool that must be called contradict each other", "tool_choice")
        wanted = [tool for tool in tools if choice.mode in ("required", tool.name)]
        text = call_grammar(format, wanted, prompts.tokenizer, is_several=choice.is_parallel)
        constraint, format = ConstraintSpec(ConstraintKind.GRAMMAR, text), forced_format(format)
    return _reading(format, tools, constraint, hidden_markers(format, prompts.tokenizer))


def _reading(
    format: AnswerFormat, tools: Sequence[Tool], constraint: ConstraintSpec | None, shown: frozenset[int]
) -> Reading:
    return Reading(lambda tail: answer_reader(format, tools, prompt=tail), constraint, shown)
