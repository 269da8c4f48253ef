"""transfer.disk and reads that may turn out not to be wanted: they wait for all else, hurry, or are dropped."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipo.base.errors import Cancelled, ReadFailed
from pipo.tiers.ram import Place
from pipo.transfer.disk import DriveSettings
from pipo.transfer.handle import Handle
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.disk_units import LAYOUTS, check_bytes, outcomes, slots
from tests.support.transfers import SMALL_CHUNKS, Opened, deadline, opened, xor_rows

ONE_WORKER = DriveSettings(SMALL_CHUNKS.chunk_bytes, 1)


class Gate:
    """An `os.preadv` that waits until it is let through, and notes where it read."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.is_waiting = threading.Event()
        self._let = threading.Semaphore(0)

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.is_waiting.set()
        self._let.acquire()
        return os.preadv(fd, buffers, offset)

    def open(self) -> None:
        for _ in range(1000):
            self._let.release()


def unit_of(offset: int) -> int:
    """Direct reads begin with the page before a unit."""
    return max(i for i, layout in enumerate(LAYOUTS) if layout.reads[0].extent.offset < offset + 4096)


def in_order(offsets: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(unit_of(offset) for offset in offsets))


@contextmanager
def behind(gate: Gate, path: Path) -> Iterator[tuple[Opened, list[Place], Handle, Handle]]:
    """The only worker is held up in the read of unit 0, and unit 1 is guessed behind it."""
    with deadline(20), opened([path], ONE_WORKER, repack=xor_rows, preadv=gate) as disk, slots(disk.ledger) as places:
        first = disk.transfer.submit(LAYOUTS[0].reads, places[0], "first")
        assert gate.is_waiting.wait(10)
        yield disk, places, first, disk.transfer.submit(LAYOUTS[1].reads, places[1], "guess", is_guess=True)


def test_a_guess_waits_for_what_is_wanted(path: Path, content: bytes) -> None:
    gate = Gate()
    with behind(gate, path) as (disk, places, first, guess):
        wanted = disk.transfer.submit(LAYOUTS[2].reads, places[2], "wanted")
        gate.open()
        assert outcomes([first, guess, wanted]) == [None] * 3
        assert in_order(gate.offsets) == [0, 2, 1]
        for i, place in enumerate(places):
            check_bytes(i, place, content)


def test_a_guess_that_hurries_goes_with_all_else(path: Path, content: bytes) -> None:
    gate = Gate()
    with behind(gate, path) as (disk, places, _first, guess):
        disk.transfer.hurry(guess)
        later = disk.transfer.submit(LAYOUTS[2].reads, places[2], "later")
        gate.open()
        assert outcomes([guess, later]) == [None, None]
        assert in_order(gate.offsets) == [0, 1, 2]


def test_a_guess_that_has_not_begun_is_dropped(path: Path, content: bytes) -> None:
    gate = Gate()
    with behind(gate, path) as (disk, places, first, guess):
        assert disk.transfer.drop(guess) and guess.is_done and not disk.transfer.drop(guess)
        with pytest.raises(Cancelled, match="guess is not wanted"):
            guess.wait(0)
        wanted = disk.transfer.submit(LAYOUTS[2].reads, places[1], "in its place")
        gate.open()
        assert outcomes([first, wanted]) == [None, None], "nothing else ends with it"
        check_bytes(0, places[0], content)


def test_a_guess_that_has_begun_is_not(path: Path, content: bytes) -> None:
    gate = Gate()
    with deadline(20), opened([path], ONE_WORKER, repack=xor_rows, preadv=gate) as disk, slots(disk.ledger) as places:
        guess = disk.transfer.submit(LAYOUTS[1].reads, places[1], "guess", is_guess=True)
        assert gate.is_waiting.wait(10)
        assert not disk.transfer.drop(guess)
        gate.open()
        assert outcomes([guess]) == [None]
        check_bytes(1, places[1], content)


def test_guesses_leave_workers_to_what_is_wanted(path: Path, content: bytes) -> None:
    """However many there are: half of the workers begin at once with the next read that is wanted."""
    gate = Gate()
    settings = DriveSettings(SMALL_CHUNKS.chunk_bytes, 4)
    with deadline(20), opened([path], settings, repack=xor_rows, preadv=gate) as disk, slots(disk.ledger) as places:
        guesses = [disk.transfer.submit(LAYOUTS[i].reads, places[i], "guess", is_guess=True) for i in (0, 1)]
        _wait_for(lambda: len(gate.offsets) == 2)
        wanted = disk.transfer.submit(LAYOUTS[2].reads, places[2], "wanted")
        _wait_for(lambda: len(gate.offsets) == 4)
        assert [unit_of(offset) for offset in gate.offsets[2:]] == [2, 2]
        gate.open()
        assert outcomes([*guesses, wanted]) == [None] * 3


def _wait_for(is_so: object) -> None:
    assert callable(is_so)
    event = threading.Event()
    for _ in range(500):
        if is_so():
            return
        event.wait(0.02)
    raise AssertionError("it did not come about")


@pytest.mark.parametrize("nth", [1, 3, 6, 9])
def test_a_failing_read_ends_guesses_too(path: Path, content: bytes, nth: int) -> None:
    preadv = faulty_preadv(Fault.FAIL, nth, for_ever=True)
    with deadline(20), opened([path], ONE_WORKER, repack=xor_rows, preadv=preadv) as disk, slots(disk.ledger) as places:
        handles: list[Handle] = [
            disk.transfer.submit(LAYOUTS[i].reads, places[i], "unit", is_guess=bool(i % 2)) for i in range(3)
        ]
        errors = [error for error in outcomes(handles) if error is not None]
        assert errors and all(type(error) is ReadFailed for error in errors)


def test_closing_ends_a_guess(path: Path, content: bytes) -> None:
    gate = Gate()
    with behind(gate, path) as (disk, _places, _first, guess):
        disk.transfer.close()
        (error,) = outcomes([guess])
        assert type(error) is Cancelled
        gate.open()
