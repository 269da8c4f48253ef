"""Batch jobs that are killed, interrupted, cut or left without disk: no row is lost, none is answered twice."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bench.random_model import write_random_model
from pipo.base.errors import OutputFailed, PipoError
from pipo.jobs.batch import Batch
from pipo.jobs.reader import Reader
from tests.support.batches import EchoEngine, answer_all, settings_of
from tests.support.command_line import TIMEOUT_S, CommandLine

NUM_ROWS = 48
FLAGS = ("--raw", "--temp", "0", "-n", "24", "--ignore-eos", "--ram", "600MB", "--num-sequences", "2", "-q")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    return path


@pytest.fixture(scope="module")
def command(model: Path, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine.in_folder(tmp_path_factory.mktemp("pipo"), model)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "in.jsonl"
    lines = [json.dumps({"id": i, "prompt": f"row {'x' * (i % 5)} {i}" if i % 16 else ""}) for i in range(NUM_ROWS)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(command: CommandLine, model: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of a job that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    ended = command("batch", str(model), str(table), "-o", str(out), *FLAGS)
    assert ended.code == 3, ended.err  # every 16th prompt is empty
    return out.read_bytes()


def _rows_of(journal: Path) -> list[int]:
    """Of whole lines behind the first."""
    if not journal.exists():
        return []
    return [json.loads(line)["row"] for line in journal.read_bytes().split(b"\n")[1:-1]]


def _started(command: CommandLine, model: Path, table: Path, out: Path) -> subprocess.Popen[bytes]:
    return command.start("batch", str(model), str(table), "-o", str(out), *FLAGS, "--resume")


def _wait_for_rows(process: subprocess.Popen[bytes], journal: Path, num_rows: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(_rows_of(journal)) < num_rows and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With no chance to clean up; those that it started must find out by themselves."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, TIMEOUT_S)
    assert not alive, "a child outlived the job"


def test_kills_at_many_points_change_nothing(
    command: CommandLine, model: Path, table: Path, expected: bytes, tmp_path: Path
) -> None:
    """One job, killed again and again as it grows: while it starts, between groups, near its end."""
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    seed = random.randrange(1 << 32)
    points = [0, *sorted(random.Random(seed).sample(range(1, NUM_ROWS), 4))]
    kept: list[int] = []
    for point in points:
        process = _started(command, model, table, out)
        _wait_for_rows(process, journal, point)
        _kill(process)
        rows = _rows_of(journal)
        assert rows[: len(kept)] == kept, f"seed {seed}: what was kept has changed"
        assert len(set(rows)) == len(rows), f"seed {seed}: a row was answered twice"
        kept = rows
        if out.exists():  # it was faster
            break
    else:
        process = _started(command, model, table, out)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 3
    assert out.read_bytes() == expected, f"seed {seed}"
    assert not journal.exists() or out.exists()


def test_a_kill_while_the_job_starts_leaves_nothing_in_the_way(
    command: CommandLine, model: Path, table: Path, expected: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    for delay_s in (0.2, 0.8, 1.4):
        process = command.start("batch", str(model), str(table), "-o", str(out), *FLAGS)
        time.sleep(delay_s)
        _kill(process)
        assert not _rows_of(tmp_path / "out.jsonl.journal") and not out.exists()
    ended = command("batch", str(model), str(table), "-o", str(out), *FLAGS)
    assert ended.code == 3 and out.read_bytes() == expected


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interrupt_keeps_what_is_answered_and_says_how_to_go_on(
    command: CommandLine, model: Path, table: Path, expected: bytes, tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """Where a second one comes while the first is heeded, what is answered is kept all the same."""
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    arguments = ("batch", str(model), str(table), "-o", str(out), *FLAGS)
    process = command.start(*arguments)
    _wait_for_rows(process, journal, 4)
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    _, err = process.communicate(timeout=TIMEOUT_S)
    if process.returncode == 3:
        pytest.skip("the job was done before it could be interrupted")
    assert process.returncode == 128 + number
    assert not psutil.wait_procs(children, TIMEOUT_S)[1], "a child outlived the job"
    num_kept = len(_rows_of(journal))
    said = err.decode()
    assert times > 1 or (f"{num_kept} of {NUM_ROWS} rows are answered and kept" in said and "--resume" in said)
    assert "Traceback" not in said
    refused = command(*arguments)
    assert refused.code == 2 and "--resume" in refused.err
    assert command(*arguments, "--resume").code == 3
    assert out.read_bytes() == expected


def test_a_journal_cut_anywhere_gives_the_same_output(model: Path, table: Path, tmp_path: Path) -> None:
    """As a power cut may leave it: every row that is not there whole is asked again, no other. What a kill left of an
    output, or between an output's name and the end of its journal, is in nobody's way.
    """
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    with Batch(settings_of(model, table, out)) as job:
        answer_all(job, EchoEngine())
        whole = journal.read_bytes()
        job.publish()
    expected = out.read_bytes()
    seed = random.randrange(1 << 32)
    for cut in [0, 1, len(whole) - 1, *random.Random(seed).sample(range(len(whole)), 6)]:
        out.unlink() if cut % 2 else out.with_name("out.jsonl.part").write_text("half an out")
        journal.write_bytes(whole[:cut])
        num_kept = len(_rows_of(journal))
        engine = EchoEngine()
        with Batch(settings_of(model, table, out, is_resumed=True)) as job:
            assert job.tally.num_done == num_kept
            if not job.is_complete:
                answer_all(job, engine)
            job.publish()
        assert len(engine.asked) <= NUM_ROWS - num_kept
        assert out.read_bytes() == expected, f"seed {seed}, cut at {cut}"


class _FullDisk(io.FileIO):
    """Takes so many bytes."""

    room = 0

    def write(self, data: bytes) -> int:  # a superset of the buffers that a FileIO takes is not needed here
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize("room", [0, 700])
def test_a_disk_that_is_full_at_the_end_loses_nothing(model: Path, table: Path, tmp_path: Path, room: int) -> None:
    out = tmp_path / "out.jsonl"

    def create(path: Path) -> io.FileIO:
        stream = _FullDisk(path, "w")
        stream.room = room
        return stream

    with Batch(settings_of(model, table, out), create=create) as job:
        answer_all(job, EchoEngine())
        with pytest.raises(OutputFailed) as caught:
            job.publish()
    assert "No space left" in caught.value.message and "--resume" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.journal"]
    with Batch(settings_of(model, table, out, is_resumed=True)) as job:
        assert job.is_complete
        job.publish()
    assert len(out.read_bytes().splitlines()) == NUM_ROWS


def test_a_disk_that_is_full_meanwhile_ends_the_job_and_it_goes_on_later(
    model: Path, table: Path, tmp_path: Path
) -> None:
    room = 2500

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(data)
        return os.write(fd, data)

    settings = settings_of(model, table, tmp_path / "out.jsonl", num_sequences=1)
    with Batch(settings, write=write) as job, pytest.raises(OutputFailed, match="No space left"):
        answer_all(job, EchoEngine())
    engine = EchoEngine()
    with Batch(replace(settings, is_resumed=True)) as job:
        assert job.tally.num_done == len(_rows_of(tmp_path / "out.jsonl.journal"))
        answer_all(job, engine)
        job.publish()
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == NUM_ROWS


def test_whoever_reads_the_events_may_go_away(
    command: CommandLine, model: Path, table: Path, expected: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    process = command.start("batch", str(model), str(table), "-o", str(out), *FLAGS, "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "start"
    process.stdout.close()
    assert process.wait(TIMEOUT_S) == 141
    assert command("batch", str(model), str(table), "-o", str(out), *FLAGS, "--resume").code == 3
    assert out.read_bytes() == expected


def test_a_reader_that_dies_ends_the_job_with_an_error(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system kills it for memory."""
    windows = Reader.windows

    def dying(self: Reader) -> object:
        os.kill(self._process.pid or 0, signal.SIGKILL)
        return windows(self)

    monkeypatch.setattr(Reader, "windows", dying)
    with Batch(settings_of(model, table, tmp_path / "out.jsonl")) as job, pytest.raises(PipoError, match="died"):
        answer_all(job, EchoEngine())


def test_a_table_that_changes_before_it_is_read_ends_the_job(model: Path, table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "in.jsonl"
    copy.write_bytes(table.read_bytes())
    with Batch(settings_of(model, copy, tmp_path / "out.jsonl")) as job:
        copy.write_bytes(copy.read_bytes() + b'{"prompt": "one more"}\n')
        with pytest.raises(PipoError, match="not what it was"):
            answer_all(job, EchoEngine())
        copy.unlink()
        with pytest.raises(PipoError, match="there is no such file"):
            answer_all(job, EchoEngine())
