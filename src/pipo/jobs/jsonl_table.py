"""JSON lines: objects of any keys, or requests of OpenAI's batch format.

An object is written as its line was read, with the new keys behind its own: no number changes its form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pipo.base.errors import UsageError
from pipo.jobs.answers import Answer, AnswerNames
from pipo.jobs.openai_lines import is_openai_line, response_line
from pipo.jobs.table import Contents, Lines, OutputForm, Row, Table, sync_and_close


class JsonlTable(Table):
    def look(self) -> Contents:
        lines, columns, num_rows, is_openai = Lines(self.path), dict[str, None](), 0, False
        for text, values in self._objects(lines):
            if num_rows == 0:
                is_openai = is_openai_line(values)
            elif is_openai and not is_openai_line(values):
                raise lines.failed("a request with custom_id, method, url and body, as line 1 is", text)
            columns.update(dict.fromkeys(values))
            num_rows += 1
        if not num_rows:
            raise UsageError(f"{self.path}: has no rows", hint="a JSON object on each line")
        return Contents(tuple(columns), num_rows, {"kind": "jsonl", **lines.identity}, is_openai)

    def rows(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        return (values for _, values in self._objects(Lines(self.path)))

    def write(self, part: Path, answers: Iterator[Answer], contents: Contents, form: OutputForm) -> None:
        line_of = _openai_line(form.model) if contents.is_openai else _object_line(form.names)
        stream = form.create(part)
        try:
            for answer, (text, values) in zip(answers, self._objects(Lines(self.path)), strict=False):
                stream.write(line_of(answer, text, values).encode() + b"\n")
            sync_and_close(stream)
        finally:
            stream.close()

    def taken_names(self, contents: Contents, names: AnswerNames) -> list[str]:
        return [] if contents.is_openai else super().taken_names(contents, names)

    def _objects(self, lines: Lines) -> Iterator[tuple[str, dict[str, object]]]:
        """Lines as they are, and what they say. Empty lines are no rows."""
        for line in lines:
            text = line.strip()
            if text:
                yield text, self._parsed(lines, text)

    def _parsed(self, lines: Lines, text: str) -> dict[str, object]:
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise lines.failed("a JSON object", f"{error}: {text}") from error
        if not isinstance(values, dict):
            raise lines.failed("a JSON object", text)
        return values


_LineOf = Callable[[Answer, str, dict[str, object]], str]


def _object_line(names: AnswerNames) -> _LineOf:
    def line(answer: Answer, text: str, values: dict[str, object]) -> str:
        added = json.dumps(names.values(answer), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        return f"{text[:-1].rstrip()}{', ' if values else ''}{added[1:]}"

    return line


def _openai_line(model: str) -> _LineOf:
    return lambda answer, text, values: response_line(answer, values, model)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
