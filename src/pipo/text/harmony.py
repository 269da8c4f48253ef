"""gpt-oss's answers: messages with a header each, which says whether it is thinking, a call or the answer.

Source: OpenAI's description of the harmony format.
"""

from __future__ import annotations

import re

from pipo.text.answer_formats import ToolFormat
from pipo.text.answer_parts import StateReader, find_first, make_call, partial_length
from pipo.text.call_bodies import ReadCall, read_calls

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_OPENINGS = ("<|channel|>", "<|start|>", "<|message|>", "to=")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_ARGUMENTS = ToolFormat("arguments", "json")


class HarmonyReader(StateReader):
    """Channel `analysis` is thinking, a message to a recipient a call, everything else the answer. What begins
    without a header is the answer, too.
    """

    def __init__(self) -> None:
        super().__init__(self._at_start)
        self._header = ""
        self._channel = "final"
        self._recipient: str | None = None

    def _end(self, held: str) -> None:
        if self._state == self._in_message:
            self._say(held)
            self._end_message()
        elif self._state == self._at_start or "<|" not in self._header:  # words that only looked like a header
            self._out.text += held + self._header

    def _at_start(self, text: str) -> str | None:
        text, self._held = self._held + text, ""
        head = text.lstrip()
        if any(head.startswith(opening) for opening in _OPENINGS):
            self._state = self._in_header
            return text
        if any(opening.startswith(head) for opening in _OPENINGS):
            self._held = text
            return None
        self._state = self._in_message
        return text

    def _in_header(self, text: str) -> str | None:
        before, found, rest = (self._header + text).partition(_MESSAGE)
        if not found:
            self._header = before
            return None
        channel, recipient = _CHANNEL.search(before), _RECIPIENT.search(before)
        self._channel = channel[1] if channel else "final"
        self._recipient = recipient[1] if recipient else None
        self._header, self._body, self._state = "", [], self._in_message
        return rest

    def _in_message(self, text: str) -> str | None:
        text, self._held = self._held + text, ""
        found = find_first(text, _ENDS)
        if found is None:
            kept = partial_length(text, _ENDS)
            self._say(text[: len(text) - kept])
            self._held = text[len(text) - kept :]
            return None
        at, marker = found
        self._say(text[:at])
        self._end_message()
        self._state = self._in_header
        return text[at:] if marker in ("<|start|>", "<|channel|>") else text[at + len(marker) :]

    def _say(self, text: str) -> None:
        if self._recipient is not None:
            self._body.append(text)
        elif self._channel == "analysis":
            self._out.reasoning += text
        else:
            self._out.text += text

    def _end_message(self) -> None:
        """A call is whole now; what is no JSON object is shown as it is."""
        name, self._recipient, body = self._recipient, None, "".join(self._body)
        self._body = []
        if name is None:
            return
        calls = read_calls(_ARGUMENTS, f'{{"name":"x","arguments":{body.strip() or "{}"}}}', {})
        if calls is None or len(calls) != 1:
            self._out.text += body
        else:
            self._out.calls.append(make_call(ReadCall(name, calls[0].arguments), None))
