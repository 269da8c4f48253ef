"""Tables that nobody meant well: they are read or refused by name, and nothing else happens."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.base.errors import MalformedTable, PipoError, UsageError
from pipo.jobs.answers import AnswerNames
from pipo.jobs.journal import Journal
from pipo.jobs.openai_lines import is_openai_line
from pipo.jobs.prompts import PromptSettings, PromptSource
from pipo.jobs.table import Contents, OutputForm
from pipo.jobs.tables import open_table
from pipo.text.prompt_template import PromptTemplate
from tests.support.batches import GREEDY, done_answer

_TEXT = st.text(st.sampled_from('ab,"\n\r\t{}[]:1é\ufeff\x00'), max_size=60)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"a": ["x", "y", None], "b": [1, 2, 3]}), stream)
    return stream.getvalue()


PARQUET = _parquet()


def _read(name: str, data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            table = open_table(path)
            contents = table.look()
            rows = list(table.rows())
        except (MalformedTable, UsageError):
            return
        assert len(rows) == contents.num_rows > 0


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["a.csv", "a.tsv", "a.jsonl"]), _TEXT.map(str.encode) | st.binary(max_size=80))
def test_any_bytes(name: str, data: bytes) -> None:
    _read(name, data)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(PARQUET) - 1), st.integers(0, 255), st.booleans())
def test_spoilt_parquet(position: int, value: int, is_cut: bool) -> None:
    _read("a.parquet", PARQUET[:position] if is_cut else PARQUET[:position] + bytes([value]) + PARQUET[position + 1 :])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "temperature", "stop", "n", "response_format"]), _JSON))
def test_any_body_is_asked_or_refused(body: dict[str, object]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert is_openai_line(line)
    source = PromptSource(PromptSettings(GREEDY), Contents((), 1, {}, is_openai=True))
    try:
        source.ask(line)
    except UsageError:
        return


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("{}%ab |.()[]1'*ifendfor "), max_size=40))
def test_any_template(source: str) -> None:
    try:
        PromptTemplate(source).render({"a": "x", "b": [1]})
    except UsageError:
        return


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_journal(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        path.write_bytes(data)
        journal = Journal(path)
        try:
            if journal.identity() is None:
                return
            journal.repair(lambda answer: None)
        except PipoError:
            return
        finally:
            journal.close()


def test_full_disk_while_parquet_is_written_is_not_the_tables_fault(tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    (tmp_path / "in.parquet").write_bytes(PARQUET)
    table = open_table(tmp_path / "in.parquet")
    form = OutputForm(AnswerNames(), "m", lambda path: Full(path, "w"))
    with pytest.raises(OSError, match="No space left"):
        table.write(tmp_path / "out.parquet", iter([done_answer(i) for i in range(3)]), table.look(), form)
