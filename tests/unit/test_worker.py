"""generation.worker: a job on another thread, read from this one, left or closed at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from pipo.base.errors import Cancelled
from pipo.generation.worker import Worker
from tests.support.transfers import deadline


class Flag:
    """What interrupts a job: it looks at the flag before every item."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.worker = Worker(self.event.set, self.event.clear)
        self.num_made = 0

    def forever(self) -> Iterator[int]:
        for self.num_made in count():
            time.sleep(0.0001)
            if self.event.is_set():
                raise Cancelled("interrupted")
            yield self.num_made


@pytest.fixture
def flag() -> Iterator[Flag]:
    with deadline(10):
        flag = Flag()
        yield flag
        flag.worker.close()


def test_items_in_order_then_the_error(flag: Flag) -> None:
    def make() -> Iterator[int]:
        yield from range(3)
        raise ValueError("made")

    stream = flag.worker.stream(make)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="made"):
        next(stream)
    assert list(flag.worker.stream(lambda: iter("ab"))) == ["a", "b"]


def test_everything_runs_on_one_other_thread(flag: Flag) -> None:
    names = [list(flag.worker.stream(lambda: iter([threading.get_ident()]))) for _ in range(3)]
    assert names[0] == names[1] == names[2] != [threading.get_ident()]


@pytest.mark.parametrize("num_taken", [1, 3])
def test_leaving_early_waits_until_the_job_has_ended(flag: Flag, num_taken: int) -> None:
    for _ in range(20):
        stream = flag.worker.stream(flag.forever)
        for _ in range(num_taken):
            next(stream)
        stream.close()
        num_made = flag.num_made
        time.sleep(0.001)
        assert flag.num_made == num_made
        assert list(flag.worker.stream(lambda: iter([1, 2]))) == [1, 2]


def test_interrupt_from_outside_ends_one_job_only(flag: Flag) -> None:
    stream = flag.worker.stream(flag.forever)
    next(stream)
    flag.event.set()
    with pytest.raises(Cancelled):
        list(stream)
    flag.event.set()  # of nobody
    assert list(flag.worker.stream(lambda: iter([1]))) == [1]


def test_closed_worker_refuses(flag: Flag) -> None:
    late = flag.worker.stream(flag.forever)
    flag.worker.close()
    with pytest.raises(Cancelled):
        next(late)
    flag.worker.close()


def test_closing_in_the_middle(flag: Flag) -> None:
    stream = flag.worker.stream(flag.forever)
    next(stream)
    flag.worker.close()
    with pytest.raises(Cancelled):
        list(stream)


def test_closing_between_a_request_and_its_start() -> None:
    """The interrupt of `close` comes before the job clears it: the job must not run for all that."""
    interrupted, cleared = threading.Event(), threading.Event()

    def resume() -> None:
        interrupted.wait()  # until `close` has interrupted
        interrupted.clear()
        cleared.set()

    def forever() -> Iterator[int]:
        while not interrupted.is_set():
            yield 0

    with deadline(10):
        worker = Worker(interrupted.set, resume)
        outcome: list[BaseException] = []
        taker = threading.Thread(target=_taking(lambda: worker.stream(forever), outcome))
        taker.start()
        time.sleep(0.02)
        worker.close()
        taker.join()
    assert cleared.is_set() and [type(error) for error in outcome] == [Cancelled]


def _taking(make: Callable[[], Iterator[int]], outcome: list[BaseException]) -> Callable[[], None]:
    def take() -> None:
        try:
            for _ in make():
                pass
        except Cancelled as error:
            outcome.append(error)

    return take


def test_leaving_a_finished_job_does_not_interrupt_another(flag: Flag) -> None:
    old = flag.worker.stream(lambda: iter(range(3)))
    next(old)  # the other two are made, and nobody takes them
    running = flag.worker.stream(flag.forever)
    next(running)
    old.close()
    assert [next(running) for _ in range(3)] and not flag.event.is_set()
    running.close()
