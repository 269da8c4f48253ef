"""A grammar of calls alone: what a model is held to where it must call a tool, in the way its family writes calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipo.base.errors import UsageError
from pipo.text.answer_formats import AnswerFormat, MarkerTokenizer, Tool, ToolFormat, plain_format

_PARTS = re.compile(r"(\$NAME|\$ARGUMENTS)")
_SPACE = {"whitespace_pattern": r"( |\n[ \t]{0,40})"}  # as generation.grammar_text has it


def forced_format(format: AnswerFormat) -> AnswerFormat:
    """How calls are written under `call_grammar`: as the family does, or as JSON without markers."""
    return format if format.tools.call else replace(format, tools=plain_format())


def call_grammar(
    format: AnswerFormat, tools: Sequence[Tool], tokenizer: MarkerTokenizer, *, is_several: bool = False
) -> str:
    """A Lark grammar, for a ConstraintSpec of kind GRAMMAR, of one call of any of the tools, or of `is_several`. The
    answer is read with `forced_format`. Raises UsageError where there is no tool.
    """
    if not tools:
        raise UsageError("a call is asked for, and there is no tool to call")
    own = forced_format(format).tools
    writer = _Writer(own, format.markers, tokenizer)
    several = f" ({writer.text(own.between)} call)*" if is_several and own.between else ""
    rules = [f"start: {writer.text(own.before)} call{several} {writer.text(own.after)}"]
    rules += ["call: " + " | ".join(f"tool_{i}" for i in range(len(tools)))]
    rules += [f"tool_{i}: {writer.call(tool)}" for i, tool in enumerate(tools)]
    return "\n".join(rules)


class _Writer:
    """Texts as Lark has them: a marker that is a control token is named by its id."""

    def __init__(self, format: ToolFormat, markers: Sequence[str], tokenizer: MarkerTokenizer) -> None:
        self._format = format
        found = {each: tokenizer.encode(each, add_special=False, parse_special=True) for each in markers}
        self._ids = {each: ids[0] for each, ids in found.items() if len(ids) == 1 and tokenizer.is_hidden(ids[0])}

    def call(self, tool: Tool) -> str:
        return " ".join(self._parts(tool))

    def _parts(self, tool: Tool) -> Iterator[str]:
        for part in _PARTS.split(self._format.call):
            if part == "$NAME":
                is_quoted = '"$NAME"' in self._format.call
                yield self.text(json.dumps(tool.name, ensure_ascii=False)[1:-1] if is_quoted else tool.name)
            elif part == "$ARGUMENTS":
                yield "%json " + json.dumps(_object_schema(tool.parameters), ensure_ascii=False)
            elif part:
                yield self.text(part)

    def text(self, text: str) -> str:
        """Literals and tokens."""
        if not text:
            return ""
        if not self._ids:
            return json.dumps(text, ensure_ascii=False)
        pieces = re.split("(" + "|".join(map(re.escape, self._ids)) + ")", text)
        named = (
            f"<[{self._ids[each]}]>" if each in self._ids else json.dumps(each, ensure_ascii=False)
            for each in pieces
            if each
        )
        return " ".join(named)


def _object_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments are an object, whatever else the schema leaves open."""
    return {"type": "object", **parameters, "x-guidance": _SPACE}
