"""The whole engine when the caller leaves early or cancels: the next answer is that of a fresh engine."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipo.base.config import SCHEDULE_NAMES
from pipo.base.errors import Cancelled
from pipo.generation.request import FinishReason
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.engines import PLENTY
from tests.support.gate import Gate
from tests.support.small_engine import GREEDY, LONG, PROMPT, answer, start


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_leaving_early_then_asking_again(
    original: Path, ram_bytes: int, healthy: tuple[int, ...], schedule: str, num_taken: int
) -> None:
    """As Ctrl-C does. The next answers, to another prompt and to the same, are those of a fresh engine."""
    other = [7, *PROMPT]
    with start(original, ram_bytes, schedule=schedule) as engine:
        want = answer(engine, other)
    with start(original, ram_bytes, schedule=schedule) as engine:
        for prompt, expected in ((other, want), (PROMPT, healthy), (PROMPT, healthy)):
            stream = engine.stream(PROMPT, LONG)
            for _ in range(num_taken):
                next(stream)
            stream.close()
            assert answer(engine, prompt) == expected
            assert engine.report is not None and engine.report.num_generated == GREEDY.max_tokens


def test_leaving_during_prefill(original: Path, ram_bytes: int, healthy: tuple[int, ...]) -> None:
    """After the first of three chunks, in the middle of what the schedule reads ahead."""
    slow = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.001)
    with start(original, ram_bytes, slow) as engine:
        for _ in range(3):
            seen: list[int] = []

            def cancel(done: int, total: int, seen: list[int] = seen) -> None:
                seen.append(done)
                engine.cancel()

            with pytest.raises(Cancelled):
                list(engine.stream([9, *PROMPT], GREEDY, cancel))
            assert seen == [8]
            assert answer(engine) == healthy


def test_cancelling_from_another_thread(original: Path, ram_bytes: int, healthy: tuple[int, ...]) -> None:
    with start(original, ram_bytes) as engine:
        stream = engine.stream(PROMPT, LONG)
        next(stream)
        threading.Thread(target=engine.cancel).start()
        with pytest.raises(Cancelled):
            list(stream)
        assert answer(engine) == healthy


def test_cancelling_nothing(original: Path, smallest: int, healthy: tuple[int, ...]) -> None:
    with start(original, smallest) as engine:
        engine.cancel()
        assert answer(engine) == healthy


def test_finishing_after_an_early_leave_is_reported(original: Path, smallest: int) -> None:
    with start(original, smallest) as engine:
        stream = engine.stream(PROMPT, LONG)
        next(stream)
        stream.close()
        assert engine.complete(PROMPT, GREEDY).finish_reason is FinishReason.LENGTH
        assert engine.report is not None and engine.report.timing.cached_tokens == len(PROMPT) - 1


def test_cancelling_while_the_drive_is_silent(original: Path, smallest: int, healthy: tuple[int, ...]) -> None:
    """At an embedding row, which is the first thing an answer reads. What comes back late does no harm."""
    gate = Gate()
    with start(original, smallest, gate) as engine:
        answer(engine)
        gate.num_left = 0
        stream = engine.stream([9, *PROMPT], LONG)
        timer = threading.Timer(0.1, engine.cancel)
        timer.start()
        begin = time.perf_counter()
        with pytest.raises(Cancelled):
            next(stream)
        assert time.perf_counter() - begin < 1.0
        threading.Timer(0.1, gate.open).start()
        assert answer(engine) == healthy


def test_reported_speed_is_the_speed_seen(original: Path) -> None:
    """Everything between two tokens counts, not only the pass."""
    with start(original, PLENTY) as engine:
        times = [time.perf_counter() for piece in engine.stream(PROMPT, LONG) if piece.token is not None]
        assert engine.report is not None
        timing = engine.report.timing
        assert timing.num_decoded == len(times) - 1
        assert engine.report.decode.wall_s < timing.decode_s
        assert timing.decode_s == pytest.approx(times[-1] - times[0], rel=0.2)
