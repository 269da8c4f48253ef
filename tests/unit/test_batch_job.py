"""A job over an engine that answers at once: every row once, equal prompts once, errors where they belong."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.random_model import write_random_model
from pipo.base.config import EngineConfig
from pipo.base.errors import ComputeError, EngineBusy, MalformedTable, UsageError
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, SamplingParams
from pipo.jobs.batch import Batch, BatchSettings
from pipo.jobs.job import MOST_WAITING, Job, Tally
from pipo.jobs.journal import JobIdentity, Journal
from pipo.jobs.preparation import Prepared
from pipo.jobs.prompts import PromptSettings
from pipo.jobs.reader import Window
from pipo.serving.contract import Summary
from tests.support.batches import GREEDY, EchoEngine, answer_all, settings_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    return path


def _table(folder: Path, prompts: Sequence[str]) -> Path:
    path = folder / "in.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "id"], *([prompt, i] for i, prompt in enumerate(prompts))])
    return path


def _run(settings: BatchSettings, engine: EchoEngine) -> list[dict[str, str]]:
    with Batch(settings) as job:
        answer_all(job, engine)
        job.publish()
    with settings.output.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _settings(model: Path, folder: Path, texts: Sequence[str], **changes: Any) -> BatchSettings:
    return settings_of(model, _table(folder, texts), folder / "out.csv", **changes)


def test_every_row_gets_the_answer_to_its_own_prompt(model: Path, tmp_path: Path) -> None:
    prompts = [f"{'a' * (i * 7 % 11)} {i % 10}" for i in range(90)]
    engine = EchoEngine()
    rows = _run(_settings(model, tmp_path, prompts), engine)
    assert [row["id"] for row in rows] == [str(i) for i in range(90)]
    lengths = {int(row["answer"].split(":")[0]) for row in rows}
    assert len(lengths) > 5 and all(row["answer"].startswith(f"{row['prompt_tokens']}:") for row in rows)
    by_prompt = {row["prompt"]: row["answer"] for row in rows}
    assert all(by_prompt[row["prompt"]] == row["answer"] for row in rows)
    assert 4 < engine.most_open <= 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_equal_prompts_are_asked_once(model: Path, tmp_path: Path) -> None:
    engine = EchoEngine()
    with Batch(_settings(model, tmp_path, [f"word {i % 3}" for i in range(200)])) as job:
        answer_all(job, engine)
        assert len(engine.asked) == 3 and job.tally.num_copied == 197 and job.tally.num_done == 200


def test_rows_that_wait_for_one_answer_are_not_all_in_memory(tmp_path: Path) -> None:
    """However large the table of equal rows is."""
    window_rows, num_windows = MOST_WAITING // 2, 9
    num_taken = 0

    class Slow(EchoEngine):
        gate = asyncio.Event()

        async def stream(self, request: GenerationRequest) -> AsyncIterator[Piece | Summary]:
            await self.gate.wait()
            async for piece in super().stream(request):
                yield piece

    async def windows() -> AsyncIterator[Window]:
        nonlocal num_taken
        for num_taken in range(1, num_windows + 1):
            first = (num_taken - 1) * window_rows
            yield [Prepared(first + i, GenerationRequest((1, 2), GREEDY), b"same") for i in range(window_rows)]

    async def run() -> None:
        engine = Slow()
        running = asyncio.create_task(Job(engine, journal, tally, 4).run(windows()))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert num_taken == 3, "one row asks, and so many wait"
        engine.gate.set()
        await running

    journal, tally = Journal(tmp_path / "journal"), Tally(window_rows * num_windows)
    journal.begin(JobIdentity({}, {}, {}, {}))
    asyncio.run(run())
    assert tally.num_done == tally.num_rows == tally.num_copied + 1
    assert [answer.row for answer in journal.in_order(tally.num_rows)] == list(range(tally.num_rows))
    journal.close()


def test_answers_that_are_drawn_are_drawn_for_each_row(model: Path, tmp_path: Path) -> None:
    engine = EchoEngine()
    drawn = PromptSettings(SamplingParams(temperature=1, max_tokens=4), is_raw=True)
    _run(_settings(model, tmp_path, ["same"] * 5, prompts=drawn), engine)
    assert len(engine.asked) == 5


def test_rows_that_cannot_be_asked_have_an_error_and_the_others_an_answer(model: Path, tmp_path: Path) -> None:
    rows = _run(_settings(model, tmp_path, ["fine", "", "long " * 200, "fine too"]), EchoEngine())
    assert [bool(row["error"]) for row in rows] == [False, True, True, False]
    assert rows[1]["error"] == "the prompt is empty" and "context of 64" in rows[2]["error"]
    assert rows[3]["finish_reason"] == "stop" and rows[2]["answer"] == ""


def test_a_refusal_of_the_engine_is_the_rows_own(model: Path, tmp_path: Path) -> None:
    engine = EchoEngine(failures={1: UsageError("not this one")})
    rows = _run(_settings(model, tmp_path, [f"row {'x' * i}" for i in range(4)]), engine)
    assert [row["error"] for row in rows].count("not this one") == 1 and len(engine.asked) == 4


def test_an_engine_that_is_full_is_asked_again(model: Path, tmp_path: Path) -> None:
    engine = EchoEngine(failures={i: EngineBusy("full") for i in (0, 1, 3)})
    rows = _run(_settings(model, tmp_path, ["a", "bb", "ccc"]), engine)
    assert len(engine.asked) == 6 and not any(row["error"] for row in rows)


def test_an_engine_that_fails_ends_the_job_and_what_was_answered_stays(model: Path, tmp_path: Path) -> None:
    prompts = [f"row {'x' * i}" for i in range(20)]
    failing = EchoEngine(failures={12: ComputeError("broken")}, num_sequences=1)
    settings = _settings(model, tmp_path, prompts, num_sequences=1)
    with Batch(settings) as job, pytest.raises(ComputeError, match="broken"):
        answer_all(job, failing)
    with pytest.raises(UsageError, match="was not finished"):
        Batch(settings)
    engine = EchoEngine()
    resumed = settings_of(model, settings.table, settings.output, is_resumed=True, num_sequences=1)
    with Batch(resumed) as job:
        num_kept = job.tally.num_done
        assert num_kept >= 8  # but those that were open beside it
        answer_all(job, engine)
        job.publish()
    assert len(engine.asked) == 20 - num_kept
    again = tmp_path / "again"
    again.mkdir()
    assert _run(_settings(model, again, prompts), EchoEngine())
    assert settings.output.read_bytes() == (again / "out.csv").read_bytes()


def test_resume_wants_the_same_job(model: Path, tmp_path: Path) -> None:
    settings = _settings(model, tmp_path, ["a", "b"])
    with Batch(settings) as job:
        answer_all(job, EchoEngine())
    other = PromptSettings(SamplingParams(temperature=0, max_tokens=5), is_raw=True)
    with pytest.raises(UsageError, match="its settings has max_tokens 6, now it is 5"):
        Batch(settings_of(model, settings.table, settings.output, is_resumed=True, prompts=other))
    settings.table.write_text("prompt,id\na,1\nc,1\n")
    with pytest.raises(UsageError, match="its input has blake2b"):
        Batch(settings_of(model, settings.table, settings.output, is_resumed=True))
    begun_anew = settings_of(model, settings.table, settings.output, is_overwritten=True)
    assert [row["prompt"] for row in _run(begun_anew, EchoEngine())] == ["a", "c"]


@pytest.mark.parametrize("notes", ["my notes\n", "my notes"])
def test_a_file_under_the_journals_name_is_the_users(model: Path, tmp_path: Path, notes: str) -> None:
    """It is neither emptied nor removed, but where --overwrite says so."""
    journal = tmp_path / "out.csv.journal"
    journal.write_text(notes)
    for is_resumed in (False, True):
        with pytest.raises(UsageError, match="not a journal"):
            Batch(_settings(model, tmp_path, ["a"], is_resumed=is_resumed))
        assert journal.read_text() == notes
    assert len(_run(_settings(model, tmp_path, ["a"], is_overwritten=True), EchoEngine())) == 1


def test_a_table_that_changes_meanwhile_is_refused_and_the_answers_stay(model: Path, tmp_path: Path) -> None:
    settings = _settings(model, tmp_path, ["a", "b"])
    with Batch(settings) as job:
        answer_all(job, EchoEngine())
        before = settings.table.read_bytes()
        settings.table.write_bytes(before + b"c,3\n")
        with pytest.raises(MalformedTable, match="not what it was"):
            job.publish()
        settings.table.unlink()
        with pytest.raises(MalformedTable, match="cannot read"):
            job.publish()
    assert not settings.output.exists()
    settings.table.write_bytes(before)
    engine = EchoEngine()
    with Batch(settings_of(model, settings.table, settings.output, is_resumed=True)) as job:
        assert job.is_complete
        job.publish()
    assert not engine.asked and settings.output.is_file()


def test_without_c_the_context_is_what_the_longest_row_needs(model: Path, tmp_path: Path) -> None:
    settings = _settings(model, tmp_path, ["a", "one two three", "x " * 3000], config=EngineConfig(ram="2GB"))
    engine = EchoEngine()
    with Batch(settings) as job:
        answer_all(job, engine)
        longest = max(len(request.prompt) for request in engine.asked)
        assert job.context_tokens == longest + (GREEDY.max_tokens or 0)
        assert job.tally.num_failed == 1  # the model itself has no room for it


def test_a_table_that_is_not_there_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.csv: there is no such file"):
        Batch(settings_of(model, tmp_path / "none.csv", tmp_path / "out.csv"))
    assert not list(tmp_path.iterdir())


def test_first_rows_alone(model: Path, tmp_path: Path) -> None:
    assert len(_run(_settings(model, tmp_path, ["a", "b", "c"], num_rows=2), EchoEngine())) == 2


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("in.csv", "part of the input"),
        ("out.jsonl", "same kind"),
        ("no/out.csv", "no folder"),
        ("folder.csv", "folder"),
    ],
)
def test_places_that_an_output_cannot_have(model: Path, tmp_path: Path, output: str, says: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    table = _table(tmp_path, ["a"])
    with pytest.raises(UsageError, match=says):
        Batch(settings_of(model, table, tmp_path / output, is_overwritten=True))
    assert not (tmp_path / f"{output}.journal").exists()


def test_a_folder_that_no_job_made_is_never_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("Hi")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="no job has made"):
        Batch(settings_of(model, tmp_path / "in", tmp_path / "mine", is_overwritten=True))
    for settings in ({}, {"is_overwritten": True}):
        with Batch(settings_of(model, tmp_path / "in", tmp_path / "out", **settings)) as job:
            answer_all(job, EchoEngine())
            job.publish()
        accounts = (tmp_path / "out" / "accounts.jsonl").read_text()
        assert json.loads(accounts)["file"] == "a.txt" and (tmp_path / "out" / "a.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "mine", "out"]
