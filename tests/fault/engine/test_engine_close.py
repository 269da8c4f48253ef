"""Closing the whole engine during an answer, and while the drive is silent."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipo.base.errors import Cancelled
from pipo.compute.repack import RepackBuffer
from pipo.tiers.ledger import Ledger
from pipo.transfer.disk import CLOSE_S
from tests.support.gate import Gate
from tests.support.small_engine import LONG, PROMPT, answer, start


def test_closing_during_an_answer(original: Path, ram_bytes: int) -> None:
    """Whoever iterates hears of it; so does whoever begins to iterate only now."""
    engine = start(original, ram_bytes)
    stream, late = engine.stream(PROMPT, LONG), engine.stream(PROMPT, LONG)
    next(stream)
    begin = time.perf_counter()
    engine.close()
    assert time.perf_counter() - begin < 1.0
    with pytest.raises(Cancelled):
        list(stream)
    with pytest.raises(Cancelled):
        next(late)


@pytest.mark.parametrize("num_left", [0, 3, 5, 10, 40])
def test_closing_while_reads_are_stuck(
    original: Path, smallest: int, ledgers: list[Ledger], monkeypatch: pytest.MonkeyPatch, num_left: int
) -> None:
    """A drive that has gone silent, at embedding rows or at weights to repack, does not hold up `close`. Reads that
    come back later find that nobody wants them, and the last one gives its buffers back.
    """
    gate, used_too_late = Gate(), list[bool]()
    repack_rows = RepackBuffer.repack_rows

    def noted(self: RepackBuffer, *arguments: Any) -> None:
        used_too_late.append(not self._buffer)
        repack_rows(self, *arguments)

    monkeypatch.setattr(RepackBuffer, "repack_rows", noted)
    engine = start(original, smallest, gate)
    answer(engine)
    gate.num_left = num_left
    stream = engine.stream([9, *PROMPT], LONG)

    def take() -> None:
        with pytest.raises(Cancelled):
            list(stream)

    taker = threading.Thread(target=take)
    taker.start()
    while not gate.num_stuck:
        time.sleep(0.001)
    time.sleep(0.02)  # for the other workers to get stuck as well
    begin = time.perf_counter()
    engine.close()
    assert time.perf_counter() - begin < 3 * CLOSE_S
    taker.join(5)
    assert not taker.is_alive()
    gate.open()
    while any(ledger.in_use_bytes for ledger in ledgers):
        time.sleep(0.001)
    assert not any(used_too_late)
