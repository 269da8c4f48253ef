"""The journal of a batch job: whose it is, what of it counts after a crash, and its rows in order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipo.base.errors import OutputFailed, UsageError
from pipo.jobs.answers import Answer
from pipo.jobs.journal import JobIdentity, Journal
from tests.support.batches import done_answer

IDENTITY = JobIdentity({"name": "m"}, {"blake2b": "x"}, {"temp": 0}, {"context_tokens": 9})


def _begun(path: Path, answers: list[Answer]) -> Journal:
    journal = Journal(path)
    journal.begin(IDENTITY)
    journal.append(answers)
    return journal


def _found(journal: Journal) -> list[Answer]:
    found: list[Answer] = []
    journal.repair(found.append)
    return found


def test_answers_come_back_in_order_wherever_they_stand(tmp_path: Path) -> None:
    answers = [done_answer(2, "two\n"), Answer(0, error="no", code="c"), done_answer(3, "\udc80 é"), done_answer(1)]
    journal = _begun(tmp_path / "j", answers)
    assert list(journal.in_order(4)) == sorted(answers, key=lambda each: each.row)
    offsets = journal.append([done_answer(5, "five"), done_answer(4)])
    assert journal.read(offsets[0]) == done_answer(5, "five") and journal.read(offsets[1]) == done_answer(4)
    with pytest.raises(OutputFailed, match="row 6"):
        list(journal.in_order(7))
    journal.close()


def test_every_cut_keeps_whole_lines_and_nothing_else(tmp_path: Path) -> None:
    path, answers = tmp_path / "j", [done_answer(i, f"text {i}") for i in range(3)]
    _begun(path, answers).close()
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 0x0A]
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        journal = Journal(path)
        num_whole = sum(end <= cut for end in ends)
        if num_whole == 0:
            assert journal.identity() is None and not journal.has_answers()
        else:
            assert journal.identity() == IDENTITY
            assert _found(journal) == answers[: num_whole - 1]
            assert path.read_bytes() == data[: ends[num_whole - 1]]
        journal.close()


def test_a_damaged_line_ends_what_counts(tmp_path: Path) -> None:
    path = tmp_path / "j"
    _begun(path, [done_answer(i) for i in range(4)]).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"row": true, "text": "x"}\n', *lines[3:]]))
    journal = Journal(path)
    assert _found(journal) == [done_answer(0)]
    assert path.read_bytes() == b"".join(lines[:2])
    journal.close()


@pytest.mark.parametrize("part", ["model", "input", "settings"])
def test_another_jobs_journal_names_what_differs(tmp_path: Path, part: str) -> None:
    other = JobIdentity(**{**{name: getattr(IDENTITY, name) for name in IDENTITY.__slots__}, part: {"temp": 1}})
    with pytest.raises(UsageError, match=f"of another job: its {part} has"):
        IDENTITY.check_same(other, tmp_path / "j")
    IDENTITY.check_same(JobIdentity({"name": "m"}, {"blake2b": "x"}, {"temp": 0}, {"context_tokens": 1}), tmp_path)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text("my notes\n")
    journal = Journal(path)
    with pytest.raises(UsageError, match="not a journal"):
        journal.identity()
    assert path.read_text() == "my notes\n"
    journal.close()


def test_two_jobs_cannot_have_one_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with pytest.raises(OutputFailed, match="another pipo"):
        Journal(tmp_path / "j")
    journal.close()
    Journal(tmp_path / "j").close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    room = 400

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_bytes = os.write(fd, data[:room])
        room -= num_bytes
        return num_bytes

    journal = Journal(tmp_path / "j", write=write)
    journal.begin(IDENTITY)
    journal.append([done_answer(0)])
    with pytest.raises(OutputFailed) as caught:
        journal.append([done_answer(1, "long " * 100)])
    assert "No space left" in caught.value.message and "--resume" in (caught.value.hint or "")
    room = 10_000
    journal.append([done_answer(2)])
    assert _found(journal) == [done_answer(0), done_answer(2)]
    journal.close()
