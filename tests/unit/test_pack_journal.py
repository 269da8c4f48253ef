"""packing.journal: what survives a kill, and what does not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.errors import OutputFailed
from pipo.packing.journal import Journal

MINE = {"pipo_pack": 1, "layout": "a", "sources": [["m.gguf", 1, 2, 3]]}
SUMS = ["aa", "bb", "cc"]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "out.gguf.part.journal")
    journal.begin(MINE, [])
    journal.append(0, SUMS[:2])
    journal.append(2, SUMS[2:])
    return journal


def test_what_was_appended_is_read(journal: Journal) -> None:
    assert journal.read(MINE) == SUMS


@pytest.mark.parametrize("change", [{"layout": "b"}, {"sources": []}, {"pipo_pack": 2}])
def test_of_another_pack_it_says_nothing(journal: Journal, change: dict[str, object]) -> None:
    assert journal.read(MINE | change) == []


def test_cut_anywhere_it_keeps_the_whole_lines(journal: Journal) -> None:
    raw = journal.path.read_bytes()
    for size in range(len(raw) + 1):
        journal.path.write_bytes(raw[:size])
        whole = raw[:size].count(b"\n")
        assert journal.read(MINE) == SUMS[: max(whole - 1, 0)]


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\n", b"[1]\n", b'{"tensor": 5, "checksum": "dd"}\n', b'{"tensor": 3, "checksum": 4}\n']
)
def test_garbage_ends_it(journal: Journal, garbage: bytes) -> None:
    with journal.path.open("ab") as stream:
        stream.write(garbage + b'{"checksum": "ee", "tensor": 4}\n')
    assert journal.read(MINE) == SUMS


def test_begun_anew_it_keeps_what_is_right(journal: Journal) -> None:
    journal.path.write_bytes(journal.path.read_bytes()[:-5])
    journal.begin(MINE, journal.read(MINE))
    journal.append(2, ["dd"])
    assert journal.read(MINE) == ["aa", "bb", "dd"]


def test_missing_or_removed(journal: Journal) -> None:
    journal.remove()
    assert journal.read(MINE) == []
    journal.remove()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match="nowhere"):
        Journal(tmp_path / "nowhere" / "j").begin(MINE, [])
