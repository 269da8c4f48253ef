"""What becomes of a row: an answer, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pipo.base.errors import ContextOverflow, PipoError, UsageError


@dataclass(frozen=True, slots=True)
class Answer:
    """Of the row with this index. `error` is a message, and then there is no text; `code` is what programs read."""

    row: int
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    code: str | None = None

    @classmethod
    def failed(cls, row: int, error: PipoError, prompt_tokens: int | None = None) -> Answer:
        return cls(row, prompt_tokens=prompt_tokens, error=error.message, code=_code(error))

    def to_line(self) -> bytes:
        """JSON in ASCII: text of a model or a table may hold half a surrogate pair."""
        values = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Answer | None:
        """None where the line is not one of `to_line`."""
        try:
            values = json.loads(line)
            return cls(**values) if _is_answer(values) else None
        except (ValueError, TypeError):
            return None


_FIELDS = ("row", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error", "code")


def _is_answer(values: object) -> bool:
    if not isinstance(values, Mapping):
        return False
    row, has_answer = values.get("row"), isinstance(values.get("text"), str) or isinstance(values.get("error"), str)
    return isinstance(row, int) and not isinstance(row, bool) and row >= 0 and has_answer


def _code(error: PipoError) -> str:
    if isinstance(error, ContextOverflow):
        return "context_length_exceeded"
    return "invalid_request" if isinstance(error, UsageError) else "failed"


@dataclass(frozen=True, slots=True)
class AnswerNames:
    """What the new columns are called."""

    answer: str = "answer"
    finish_reason: str = "finish_reason"
    prompt_tokens: str = "prompt_tokens"
    completion_tokens: str = "completion_tokens"
    error: str = "error"

    @classmethod
    def prefixed(cls, prefix: str) -> AnswerNames:
        return cls(*(prefix + name for name in _COLUMNS))

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in _COLUMNS)

    def values(self, answer: Answer) -> dict[str, object]:
        """By column, in order."""
        found = (answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens, answer.error)
        return dict(zip(self.all, found, strict=True))


_COLUMNS = ("answer", "finish_reason", "prompt_tokens", "completion_tokens", "error")
