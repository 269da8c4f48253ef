"""`pipo batch` as a user runs it: every kind of table, the answers `pipo run` gives, refusals before any work."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.command_line import CommandLine, Ended

THINGS = ("sea", "moon", "sun", "wind, cold", "rain", 'the "fog"')
NUM_ROWS = 12
FLAGS = ("--temp", "0", "-n", "8", "--ram", "400MB", "--num-sequences", "4", "--prefill-chunk", "16")
TEMPLATE = ("--prompt-template", "Tell me about {{ thing }}.")


def _rows() -> list[dict[str, Any]]:
    return [{"id": i, "thing": THINGS[i % 6] + (" again" if i > 8 else "")} for i in range(NUM_ROWS)]


def _batch(pipo: CommandLine, table: Path, out: Path, *more: str, code: int = 0) -> Ended:
    ended = pipo("batch", "smollm2", str(table), "-o", str(out), *FLAGS, *more)
    assert ended.code == code, ended.err
    return ended


@pytest.fixture(scope="module")
def answers(pipo: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a table in JSON lines, which are compared with those of the others."""
    folder = tmp_path_factory.mktemp("jsonl")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    ended = _batch(pipo, folder / "in.jsonl", folder / "out.jsonl", *TEMPLATE)
    for word in ("12 rows", "4 at a time", "for the engine", "3 had another row's prompt", "tok/s", "sweeps/s", "peak"):
        assert word in ended.err
    assert ended.out == ""
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [{"id": row["id"], "thing": row["thing"]} for row in found] == _rows()
    assert all(row["error"] is None and row["completion_tokens"] == 8 for row in found)
    return [row["answer"] for row in found]


def test_answers_are_those_of_run(pipo: CommandLine, answers: list[str]) -> None:
    same = ("--temp", "0", "-n", "8", "--prefill-chunk", "16")
    for i in (0, 11):
        ended = pipo("run", "smollm2", f"Tell me about {_rows()[i]['thing']}.", *same)
        assert ended.out.removesuffix("\n") == answers[i].removesuffix("\n")


def test_csv(pipo: CommandLine, answers: list[str], tmp_path: Path) -> None:
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "thing"])
        writer.writeheader()
        writer.writerows(_rows())
    (tmp_path / "template.txt").write_text(TEMPLATE[1])
    ended = _batch(pipo, table, out, "--prompt-template", str(tmp_path / "template.txt"), "--json", "--quiet")
    with out.open(newline="") as stream:
        assert [row["answer"] for row in csv.DictReader(stream)] == answers
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["start", "end"]
    assert events[-1]["num_done"] == NUM_ROWS and events[-1]["num_copied"] == 3
    assert events[-1]["peak_bytes"] < events[-1]["limit_bytes"] == 400_000_000
    assert ended.err == ""


def test_parquet(pipo: CommandLine, answers: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": f"Tell me about {row['thing']}.", "id": row["id"]} for row in _rows()]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("prompt", pa.string()), ("id", pa.uint8())]))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    _batch(pipo, tmp_path / "in.parquet", tmp_path / "out.parquet", "--column-prefix", "pipo_")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["pipo_answer"].to_pylist() == answers and found.select(["prompt", "id"]).equals(table)


def test_openai_lines(pipo: CommandLine, answers: list[str], tmp_path: Path) -> None:
    def line(i: int, **more: object) -> str:
        messages = [{"role": "user", "content": f"Tell me about {_rows()[i]['thing']}."}]
        body = {"model": "gpt-4o", "messages": messages, "max_completion_tokens": 8, "temperature": 0, **more}
        return json.dumps({"custom_id": f"row-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})

    (tmp_path / "in.jsonl").write_text("\n".join([*(line(i) for i in range(NUM_ROWS)), line(0, n=2)]) + "\n")
    ended = _batch(pipo, tmp_path / "in.jsonl", tmp_path / "out.jsonl", code=3)
    assert "1 of 13 rows have an error" in ended.err
    found = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["custom_id"] for each in found[:NUM_ROWS]] == [f"row-{i}" for i in range(NUM_ROWS)]
    bodies = [each["response"]["body"] for each in found]
    assert [body["choices"][0]["message"]["content"] for body in bodies[:NUM_ROWS]] == answers
    assert found[-1]["response"]["status_code"] == 400 and "n 2" in bodies[-1]["error"]["message"]


def test_folder(pipo: CommandLine, answers: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for row in _rows():
        (folder / f"{row['id']:02}.txt").write_text(row["thing"])
    _batch(pipo, folder, tmp_path / "out", "--prompt-template", "Tell me about {{ text }}.")
    assert [(tmp_path / "out" / f"{i:02}.txt").read_text() for i in range(NUM_ROWS)] == answers
    accounts = [json.loads(line) for line in (tmp_path / "out" / "accounts.jsonl").read_text().splitlines()]
    assert [each["file"] for each in accounts] == [f"{i:02}.txt" for i in range(NUM_ROWS)]


def test_number_of_sequences_is_chosen_from_the_plan(pipo: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(4)))
    ended = pipo(
        "batch", "smollm2", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"),
        "--temp", "0", "-n", "2", "--ram", "300MB", "--json", "--limit", "3",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    start = json.loads(ended.out.splitlines()[0])
    assert 1 <= start["engine"]["num_sequences"] <= 3
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--prompt-template", "{{ thin }}"), "the table has 'id', 'thing'"),
        (("--prompt-column", "x"), "the table has 'id', 'thing'"),
        ((), "which column is the prompt?"),
        (("--prompt-template", "no-such-file.txt"), "No such file"),
        (("--prompt-template", "{{ thing"), "not valid Jinja"),
        (("--prompt-column", "thing", "--prompt-template", "{{ thing }}"), "contradict"),
        (("--prompt-column", "thing", "--num-sequences", "0"), "--num-sequences"),
        (("--prompt-column", "thing", "--resume", "--overwrite"), "contradict"),
        (("--prompt-column", "thing", "--schema", "in.csv"), "is no JSON"),
        (("--prompt-column", "thing", "--ram", "100MB"), "the smallest --ram that works is"),
        (("--prompt-column", "thing", "--ray-workers", "2"), "--ray-workers needs --ray"),
    ],
)
def test_refused_before_anything_is_computed(
    pipo: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("id,thing\n1,sea\n")
    ended = pipo("batch", "smollm2", "in.csv", "-o", "out.csv", "-n", "4", "--temp", "0", *flags)
    assert ended.code in (1, 2) and says in ended.err and "Traceback" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"id": [1]}), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "flags", "says"),
    [
        ("in.csv", b"id,prompt\n1,sea\n2,a,b\n", (), "line 3: wanted 2 values, as the header has, found 3"),
        ("in.csv", b"id,prompt\n1,\xff\n", (), "line 2: wanted UTF-8, found byte 2 of the line, 0xFF"),
        ("in.jsonl", b'{"prompt": "sea"}\n{"prompt": \n', (), "line 2: wanted a JSON object"),
        ("in.parquet", _parquet(), ("--prompt-column", "prompt"), "'prompt', the table has 'id'"),
        ("in.parquet", b"PAR1 no more", (), "is not a sound Parquet file"),
        ("in.txt", b"sea", (), "no table that can be read"),
        ("in.csv", b"prompt\nsea\n", ("-o", "no/such/folder/out.csv"), "there is no folder"),
        ("in.csv", b"prompt\nsea\n", ("-o", "/proc/out.csv"), "/proc/out.csv.journal"),
        ("in.csv", b"prompt\nsea\n", ("-o", "in.csv"), "would be part of the input"),
    ],
)
def test_bad_tables_and_places_are_refused_in_one_line(
    pipo: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    data: bytes,
    flags: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    table, out = Path(name), f"out{Path(name).suffix}"
    table.write_bytes(data)
    ended = pipo("batch", "smollm2", name, "-o", out, "-n", "4", "--temp", "0", *flags)
    assert ended.code in (1, 2) and says in ended.err.splitlines()[0] and "Traceback" not in ended.err, ended.err
    assert [path.name for path in tmp_path.iterdir()] == [name] and table.read_bytes() == data


def test_an_output_that_is_there_is_touched_by_overwrite_alone(pipo: CommandLine, tmp_path: Path) -> None:
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_text("prompt\nsea\n" + "moon " * 200 + "\n")
    out.write_text("mine")
    for flags in ((), ("--resume",)):
        ended = pipo("batch", "smollm2", str(table), "-o", str(out), *FLAGS, *flags)
        assert ended.code == 2 and "already there" in ended.err and out.read_text() == "mine"
    ended = _batch(pipo, table, out, "--overwrite", "-c", "64", code=3)
    assert "1 of 2 rows have an error; the first: " in ended.err and "not fit the context of 64" in ended.err
    assert len(out.read_text().splitlines()) == 3 and "not fit the context of 64" in out.read_text().splitlines()[2]


def test_schema_that_is_none_is_refused(pipo: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt\nHi\n")
    (tmp_path / "schema.json").write_text('{"type": "objct"}')
    out, schema = str(tmp_path / "out.csv"), str(tmp_path / "schema.json")
    ended = pipo("batch", "smollm2", str(tmp_path / "in.csv"), "-o", out, "--schema", schema)
    assert ended.code == 2 and "objct" in ended.err


def test_start_imports_nothing_that_only_batches_need() -> None:
    program = (
        "import sys, pipo.cli.app; print([m for m in ('pyarrow', 'llguidance', 'ray', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
