"""An answer taken apart while it comes: text, thinking, and calls of tools, whole. No part of a marker is ever shown.

What only looks like a call, because its JSON is broken or no tool has its name, stays text: nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from pipo.text.answer_formats import AnswerFormat, Tool
from pipo.text.answer_parts import AnswerDelta, StateReader, ToolCall, make_call, partial_length
from pipo.text.call_bodies import read_calls
from pipo.text.harmony import HarmonyReader

__all__ = ["AnswerDelta", "AnswerReader", "MarkedReader", "ToolCall", "answer_reader"]


class AnswerReader(Protocol):
    """Of one answer. Threads: one."""

    def feed(self, text: str) -> AnswerDelta:
        """The answer's next piece."""

    def finish(self) -> AnswerDelta:
        """The rest: the answer has ended."""


def answer_reader(format: AnswerFormat, tools: Sequence[Tool] = (), *, prompt: str = "") -> AnswerReader:
    """For one answer to a rendered `prompt`, the end of which tells whether the answer begins with thinking. Without
    `tools` nothing is taken for a call.
    """
    if format.tools.body == "harmony":
        return HarmonyReader()
    return MarkedReader(format, tools, is_thinking=format.begins_in_thought(prompt))


class MarkedReader(StateReader):
    """Of answers whose parts stand between markers, or are one JSON object."""

    def __init__(self, format: AnswerFormat, tools: Sequence[Tool], *, is_thinking: bool = False) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._format = format.tools
        self._thinking = format.thinking
        super().__init__(self._in_thought if is_thinking else self._at_start)
        self._has_marker = False  # before that body
        self._space = ""  # white space that is shown once something follows
        self._drops_space = False
        self._has_calls = False

    def _end(self, held: str) -> None:
        if self._state == self._in_thought:
            self._out.reasoning += held.rstrip()
        elif self._state == self._in_call:
            self._end_call(end="")
        else:
            self._show(held)
        if not self._has_calls:
            self._out.text += self._space

    def _take_held(self, text: str) -> str:
        text, self._held = self._held + text, ""
        return text

    def _at_start(self, text: str) -> str | None:
        """Thinking comes first or not at all."""
        text = self._take_held(text)
        begin, head = self._thinking.begin if self._thinking else "", text.lstrip()
        if begin and head.startswith(begin):
            self._state, self._drops_space = self._in_thought, True
            return head[len(begin) :]
        if begin and begin.startswith(head):
            self._held = text
            return None
        self._state = self._at_answer
        return text

    def _in_thought(self, text: str) -> str | None:
        assert self._thinking is not None
        text, end = self._take_held(text), self._thinking.end
        before, found, rest = text.partition(end)
        if not found:
            kept = partial_length(text, (end,))
            kept += len(text[: len(text) - kept]) - len(text[: len(text) - kept].rstrip())
            before, self._held = text[: len(text) - kept], text[len(text) - kept :]
        before = before.rstrip() if found else before
        if self._drops_space:
            before = before.lstrip()
        self._drops_space = self._drops_space and not before
        self._out.reasoning += before
        if not found:
            return None
        self._state, self._drops_space = self._at_answer, True
        return rest

    def _at_answer(self, text: str) -> str | None:
        """Whether all of it may be a call."""
        text = self._take_held(text)
        head = text.lstrip()
        if not head and (self._drops_space or self._expects_leading):
            self._held = "" if self._drops_space else text
            return None
        if self._expects_leading and head[0] in "{[":
            if (is_call := _begins_call(head)) is None:
                self._held = text
                return None
            if is_call:
                self._state, self._body, self._has_marker = self._in_call, [], False
                return text
        self._state = self._in_text
        return text

    @property
    def _expects_leading(self) -> bool:
        return bool(self._tools) and self._format.is_leading

    def _in_text(self, text: str) -> str | None:
        text, begin = self._take_held(text), self._format.begin
        if not self._tools or not begin:
            self._show(text)
            return None
        before, found, rest = text.partition(begin)
        if found:
            self._show(before)
            self._state, self._body, self._has_marker = self._in_call, [], True
            return rest
        kept = partial_length(text, (begin,))
        self._show(text[: len(text) - kept])
        self._held = text[len(text) - kept :]
        return None

    def _in_call(self, text: str) -> str | None:
        text, end = self._take_held(text), self._format.end
        if not end or not self._has_marker:
            self._body.append(text)
            return None
        before, found, rest = text.partition(end)
        kept = 0 if found else partial_length(text, (end,))
        self._body.append(before[: len(before) - kept])
        if found:
            self._end_call(end)
            return rest
        self._held = text[len(text) - kept :]
        return None

    def _end_call(self, end: str) -> None:
        body, self._body, self._state = "".join(self._body), [], self._in_text
        calls = read_calls(self._format, body, self._tools)
        if calls is None or (not self._has_marker and not all(call.name in self._tools for call in calls)):
            self._show((self._format.begin if self._has_marker else "") + body + end)
            return
        self._space, self._drops_space, self._has_calls = "", True, True
        self._out.calls += [make_call(call, self._format.id_chars) for call in calls]

    def _show(self, text: str) -> None:
        """White space at the end waits: before a call it is none of the answer's."""
        text = self._space + text
        if self._drops_space:
            text = text.lstrip()
        shown = text.rstrip() if self._tools else text
        self._space = text[len(shown) :]
        self._drops_space = self._drops_space and not text
        self._out.text += shown


def _begins_call(head: str) -> bool | None:
    """Whether JSON that begins like this may be a call; None while that is open."""
    inside = head.lstrip("[{ \t\r\n")
    if not inside:
        return None
    key = re.match(r'"([^"]*)("?)', inside)
    if key is None:
        return False
    if key[2]:
        return key[1] in _FIRST_KEYS
    return None if any(name.startswith(key[1]) for name in _FIRST_KEYS) else False


_FIRST_KEYS = ("name", "type", "function", "arguments", "parameters", "id")
