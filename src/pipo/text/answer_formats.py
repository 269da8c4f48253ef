"""How a model writes tool calls and thinking, found by its chat template. What there is to find is data:
answer_formats.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

from pipo.base.errors import UsageError


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Of one family; answer_formats.toml says what the fields mean."""

    name: str
    body: str
    when: tuple[tuple[str, ...], ...] = ((),)
    begin: str = ""
    end: str = ""
    quote: str = ""
    inner: tuple[str, ...] = ()
    is_leading: bool = False
    before: str = ""
    call: str = ""
    between: str = ""
    after: str = ""
    id_chars: int | None = None


@dataclass(frozen=True, slots=True)
class ThinkFormat:
    """Markers around what a model thinks before it answers."""

    begin: str
    end: str


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Both, of one model."""

    tools: ToolFormat
    thinking: ThinkFormat | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Every text that tells a part from another."""
        tools = self.tools
        found = [tools.begin, tools.end, tools.quote, *tools.inner]
        if self.thinking is not None:
            found += [self.thinking.begin, self.thinking.end]
        return tuple(marker for marker in found if marker)

    def begins_in_thought(self, prompt: str) -> bool:
        """Whether the answer to a rendered prompt is thinking until `thinking.end`: a constraint has to come after it
        (`ConstraintSpec.after`).
        """
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.begin)


@dataclass(frozen=True, slots=True)
class Tool:
    """What may be called; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


class MarkerTokenizer(Protocol):
    """What is needed of a model's tokenizer."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def is_hidden(self, token_id: int) -> bool: ...


def answer_format_of(template: str | None) -> AnswerFormat:
    """By the source of a chat template. Of a model without one it is JSON without markers."""
    tools, thinking = _formats()
    text = template or ""
    found = next(each for each in tools if any(all(mark in text for mark in marks) for marks in each.when))
    return AnswerFormat(found, next((each for each in thinking if each.begin in text or each.end in text), None))


def plain_format() -> ToolFormat:
    """JSON without markers."""
    return _formats()[0][-1]


def hidden_markers(format: AnswerFormat, tokenizer: MarkerTokenizer) -> frozenset[int]:
    """The markers that are control tokens of this model: an answer's text has to show them (`GenerationRequest.shown`)
    so that its parts can be told from each other.
    """
    ids = (tokenizer.encode(marker, add_special=False, parse_special=True) for marker in format.markers)
    return frozenset(each[0] for each in ids if len(each) == 1 and tokenizer.is_hidden(each[0]))


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """From what OpenAI's API calls `tools`. Raises UsageError naming the entry."""
    return tuple(_read_tool(i, tool) for i, tool in enumerate(tools))


def _read_tool(idx: int, tool: object) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UsageError(
            f"tools[{idx}] is no function with a name", hint='{"type": "function", "function": {"name": …}}'
        )
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise UsageError(f"tools[{idx}].function.parameters must be a JSON schema, not {parameters!r:.80}")
    return Tool(name, parameters)


@cache
def _formats() -> tuple[tuple[ToolFormat, ...], tuple[ThinkFormat, ...]]:
    table = tomllib.loads(files("pipo.text").joinpath("answer_formats.toml").read_text(encoding="utf-8"))
    tools = (ToolFormat(**{key: _frozen(value) for key, value in each.items()}) for each in table["tools"])
    return tuple(tools), tuple(ThinkFormat(**each) for each in table["thinking"])


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
