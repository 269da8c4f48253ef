"""Answers of a given form in batches: whole JSON that the schema is true of, row by row, also after a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.command_line import TIMEOUT_S, CommandLine

REVIEWS = ("Lovely and quiet.", "It leaks.", "The sea is near, “very” near.", "Never again", "Kaffee gut, Zimmer schön")
NUM_ROWS = 10
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["good", "bad"]},
        "score": {"type": "integer", "minimum": 1, "maximum": 5},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["sentiment", "score", "words"],
    "additionalProperties": False,
}
FLAGS = ("--prompt-template", "Is this good or bad? {{ review }}", "-n", "96", "--temp", "0", "--ram", "400MB", "-q")


def _batch(pipo: CommandLine, table: Path, out: Path, *more: str, code: int = 0) -> list[Any]:
    ended = pipo("batch", "smollm2", str(table), "-o", str(out), *more)
    assert ended.code == code, ended.err
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Rows that differ all of them."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    lines = [json.dumps({"id": i, "review": f"{REVIEWS[i % 5]} {'Again. ' * (i // 5)}"}) for i in range(NUM_ROWS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "in.jsonl"


def test_every_answer_follows_the_schema_and_a_kill_changes_none(
    pipo: CommandLine, table: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--schema", str(tmp_path / "schema.json"), "--num-sequences", "4")
    rows = _batch(pipo, table, tmp_path / "calm.jsonl", *flags)
    assert [row["id"] for row in rows] == list(range(NUM_ROWS))
    for row in rows:
        assert row["error"] is None and row["finish_reason"] == "stop", row
        jsonschema.validate(json.loads(row["answer"]), SCHEMA)
    assert len({row["answer"] for row in rows}) > 3

    out, journal = tmp_path / "rough.jsonl", tmp_path / "rough.jsonl.journal"
    process = pipo.start("batch", "smollm2", str(table), "-o", str(out), *flags)
    deadline = time.monotonic() + TIMEOUT_S
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not out.exists()
    _batch(pipo, table, out, *flags, "--resume")
    assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def _line(i: int, **more: object) -> str:
    messages = [{"role": "user", "content": f"Is this good or bad? {REVIEWS[i % 5]}"}]
    body = {"messages": messages, "max_tokens": 96, "temperature": 0, **more}
    return json.dumps({"custom_id": f"row-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def _form(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": schema}}


def test_each_of_openais_lines_has_a_form_of_its_own(pipo: CommandLine, tmp_path: Path) -> None:
    """And one whose schema is none fails alone."""
    forms = [_form(SCHEMA), {"type": "json_object"}, {"type": "text"}, _form({"enum": ["yes", "no"]})]
    lines = [_line(i, response_format=form) for i, form in enumerate([*forms, _form({"type": "objct"})])]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    found = _batch(pipo, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--ram", "400MB", "-q", code=3)
    assert [each["response"]["status_code"] for each in found] == [200, 200, 200, 200, 400]
    said = [each["response"]["body"]["choices"][0]["message"]["content"] for each in found[:4]]
    jsonschema.validate(json.loads(said[0]), SCHEMA)
    assert isinstance(json.loads(said[1]), dict)
    assert not said[2].startswith("{") and json.loads(said[3]) in ("yes", "no")
    assert "objct" in found[4]["response"]["body"]["error"]["message"]
