"""Tables of every kind: what is read, what is refused and by which name, what an output keeps of its input."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipo.base.errors import MalformedTable, UsageError
from pipo.jobs.answers import Answer, AnswerNames
from pipo.jobs.table import OutputForm, create_file
from pipo.jobs.tables import open_table
from tests.support.batches import done_answer

FORM = OutputForm(AnswerNames(), "a model", create_file)


def _write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def _rows(path: Path) -> list[Any]:
    table = open_table(path)
    contents, rows = table.look(), list(table.rows())
    assert contents.num_rows == len(rows)
    return rows


def _answered(path: Path, answers: Iterable[Answer], form: OutputForm = FORM) -> Path:
    table = open_table(path)
    out = path.with_name(f"out{path.suffix}")
    table.write(out, iter(answers), table.look(), form)
    return out


def test_jsonl_lines_stay_as_they_were(tmp_path: Path) -> None:
    """Numbers keep their form, and keys their order: the new ones come behind."""
    lines = '{"x": 1.50, "big": 12345678901234567890, "prompt": "a\\u00e9"}\n\n{ }\n'
    out = _answered(_write(tmp_path / "in.jsonl", lines), [done_answer(0, "é\n"), Answer(1, error="why", code="x")])
    first, second = out.read_text().splitlines()
    assert first.startswith('{"x": 1.50, "big": 12345678901234567890, "prompt": "a\\u00e9", "answer": "é\\n"')
    assert json.loads(first)["completion_tokens"] == 1 and json.loads(first)["error"] is None
    assert json.loads(second) == {
        "answer": None,
        "finish_reason": None,
        "prompt_tokens": None,
        "completion_tokens": None,
        "error": "why",
    }


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2"),
        ("a.jsonl", '{"a": NaN}\n', "NaN is not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: wanted UTF-8, found byte 7 of the line, 0xFF"),
        ("a.csv", "", "header"),
        ("a.csv", "\n\n", "header"),
        ("a.csv", "a,,c\n1,2,3\n", "line 1"),
        ("a.csv", "a,b,a\n1,2,3\n", "each column once"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: wanted 2 values, as the header has, found 1"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: wanted 2 values, as the header has, found 3"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "unexpected end of data"),
        ("a.csv", b"a,b\n1,\xe9\n", "line 2: wanted UTF-8, found byte 2 of the line, 0xE9"),
        ("a.parquet", b"PAR1 this is none PAR1", "not a sound Parquet file"),
        ("a.parquet", b"", "not a sound Parquet file"),
    ],
)
def test_malformed_tables_name_the_place(tmp_path: Path, name: str, data: str | bytes, says: str) -> None:
    with pytest.raises(MalformedTable) as caught:
        open_table(_write(tmp_path / name, data)).look()
    assert says in caught.value.message and name in caught.value.message


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", "\n"), ("a.csv", "a,b\n"), ("a.txt", "x"), ("a", "x")])
def test_what_has_no_rows_or_no_kind_is_refused(tmp_path: Path, name: str, data: str) -> None:
    with pytest.raises(UsageError, match=r"has no rows|no rows|no table"):
        open_table(_write(tmp_path / name, data)).look()


def test_csv_keeps_values_line_ends_and_the_mark(tmp_path: Path) -> None:
    data = '\ufeffid,text\r\n1,"a, ""b""\nc"\r\n\r\n2,\r\n'
    path = _write(tmp_path / "in.csv", data)
    assert _rows(path) == [{"id": "1", "text": 'a, "b"\nc'}, {"id": "2", "text": ""}]
    out = _answered(path, [done_answer(0, "x,y"), done_answer(1, "")]).read_bytes().decode()
    assert out == (
        "\ufeffid,text,answer,finish_reason,prompt_tokens,completion_tokens,error\r\n"
        '1,"a, ""b""\nc","x,y",stop,3,1,\r\n2,,,stop,3,1,\r\n'
    )


def test_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    path = _write(tmp_path / "in.tsv", "a\tb\nx, y\tz\n")
    assert _rows(path) == [{"a": "x, y", "b": "z"}]
    assert _answered(path, [done_answer(0)]).read_text().splitlines()[1] == "x, y\tz\tyes\tstop\t3\t1\t"


def test_parquet_keeps_types_and_reads_only_what_is_asked(tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": pa.array(range(1000), pa.int16()),
            "when": pa.array([0] * 1000, pa.timestamp("us")),
            "nested": [{"x": [i]} for i in range(1000)],
            "text": [f"row {i}" for i in range(1000)],
        }
    ).replace_schema_metadata({"mine": "kept"})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=300)
    opened = open_table(tmp_path / "in.parquet")
    assert opened.look().num_rows == 1000
    rows = list(opened.rows({"text"}))
    assert rows[999] == {"text": "row 999"} and len(rows) == 1000
    assert list(opened.rows(set()))[:2] == [{}, {}]
    answers = [done_answer(i, str(i)) if i != 5 else Answer(5, error="bad") for i in range(700)]
    found = pq.read_table(_answered(tmp_path / "in.parquet", answers))
    assert found.num_rows == 700
    assert found.schema.names[:4] == table.schema.names and found.schema.field("n").type == pa.int16()
    assert found.schema.metadata[b"mine"] == b"kept"
    assert found.select(table.schema.names).equals(table.slice(0, 700))
    assert found["answer"].to_pylist()[4:7] == ["4", None, "6"]
    assert found["error"].to_pylist()[5] == "bad" and found["prompt_tokens"].to_pylist()[:1] == [3]


def test_folder_of_texts_in_order_with_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    _write(folder / "z.txt", "last")
    _write(folder / "b" / "é.md", "first")
    _write(folder / "bad.txt", b"\xff")
    _write(folder / ".hidden", "no")
    rows = _rows(folder)
    assert rows[0] == {"file": "b/é.md", "text": "first"} and rows[2] == {"file": "z.txt", "text": "last"}
    assert isinstance(rows[1], UsageError) and "bad.txt" in rows[1].message
    out = _answered(folder, [done_answer(0, "A"), Answer(1, error="no"), done_answer(2, "C")])
    assert (out / "b" / "é.md").read_text() == "A" and (out / "z.txt").read_text() == "C"
    assert not (out / "bad.txt").exists()
    accounts = [json.loads(line) for line in (out / "accounts.jsonl").read_text().splitlines()]
    assert [each["file"] for each in accounts] == ["b/é.md", "bad.txt", "z.txt"] and accounts[1]["error"] == "no"


def test_identity_and_version_change_with_the_table(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", "a\n1\n")
    before, version = open_table(path).look().identity, open_table(path).version()
    _write(path, "a\n2\n")
    assert open_table(path).look().identity != before and open_table(path).version() != version
    path.unlink()
    with pytest.raises(UsageError, match="there is no such file"):
        open_table(path)


def test_names_of_new_columns_do_not_collide(tmp_path: Path) -> None:
    table = open_table(_write(tmp_path / "a.jsonl", '{"x": 1}\n{"answer": 2, "error": 3}\n'))
    contents = table.look()
    assert table.taken_names(contents, AnswerNames()) == ["answer", "error"]
    assert table.taken_names(contents, AnswerNames.prefixed("pipo_")) == []
