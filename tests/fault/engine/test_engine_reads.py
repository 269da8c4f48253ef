"""The whole engine when reads fail: a typed error that says what was missing, now and at every later request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from pipo.base.errors import ReadFailed, TransferError, UnexpectedEof, UsageError
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.engines import PLENTY
from tests.support.small_engine import LONG, PROMPT, SHORT, answer, start
from tests.support.tiny_models import SPECS, make_model, write_gguf

NTH = (1, 2, 3, 4, 5, 8, 13, 21, 34, 55, 89, 144)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 tensors to read; the embeddings are the head."""
    path = tmp_path_factory.mktemp("model") / "tied.gguf"
    write_gguf(make_model(replace(SPECS["llama-tied"], num_layers=12)), path)
    return path


def count_reads(path: Path, ram_bytes: int) -> int:
    calls = count()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        next(calls)
        return os.preadv(fd, buffers, offset)

    with start(path, ram_bytes, preadv) as engine:
        answer(engine)
    return next(calls)


def test_the_sweep_covers_start_prefill_and_decode(original: Path, smallest: int) -> None:
    """9 norms, 6 chunks of a calibrating MLP, then 4 + passes of weights and embedding rows."""
    assert count_reads(original, smallest) > NTH[-1]
    assert count_reads(original, PLENTY) > NTH[9]


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize(("fault", "kind"), [(Fault.FAIL, ReadFailed), (Fault.END, UnexpectedEof)])
@pytest.mark.parametrize("nth", NTH)
def test_nth_read_fails(
    original: Path, smallest: int, nth: int, fault: Fault, kind: type[TransferError], for_ever: bool
) -> None:
    """While it starts, or in a request: then every later request ends with the same error."""
    preadv = faulty_preadv(fault, nth, for_ever=for_ever)
    with pytest.raises(kind) as failed, start(original, smallest, preadv) as engine:
        try:
            answer(engine)
        finally:
            for _ in range(2):
                with pytest.raises(kind) as again:
                    answer(engine, SHORT)
                assert again.value.offset >= 0
    error = failed.value
    assert error.path == str(original) and error.offset % 4096 == 0
    assert error.got_bytes < error.wanted_bytes <= original.stat().st_size - error.offset
    assert error.path in str(error) and f"offset {error.offset}" in str(error)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("nth", NTH[:10])
def test_nth_read_fails_of_a_model_that_stays_in_ram(original: Path, tied: Path, nth: int, is_tied: bool) -> None:
    """It is never read again, and a tied one not even for embeddings: what did not arrive must not be computed with."""
    path, preadv = tied if is_tied else original, faulty_preadv(Fault.FAIL, nth)
    with pytest.raises(ReadFailed), start(path, PLENTY, preadv) as engine:
        try:
            answer(engine, SHORT)
        finally:
            for _ in range(3):
                with pytest.raises(ReadFailed):
                    answer(engine, SHORT)


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("nth", [1, 10, 30])
@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.SLOW])
def test_reads_that_are_short_or_slow_change_nothing(
    original: Path, smallest: int, healthy: tuple[int, ...], fault: Fault, nth: int, for_ever: bool
) -> None:
    preadv = faulty_preadv(fault, nth, for_ever=for_ever, delay_s=0.002)
    with start(original, smallest, preadv) as engine:
        assert answer(engine) == healthy


class Switch:
    """A preadv that works until it is told not to."""

    def __init__(self) -> None:
        self.is_broken = False

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.is_broken:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)


def test_error_in_the_middle_of_an_answer(original: Path, smallest: int) -> None:
    """The pieces before it arrive, then the error; closing works, twice."""
    switch, pieces = Switch(), []
    engine = start(original, smallest, switch)
    with pytest.raises(ReadFailed):
        for piece in engine.stream(PROMPT, LONG):
            pieces.append(piece)
            switch.is_broken = len(pieces) >= 2
    assert 2 <= len(pieces) < 200 and engine.report is not None
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="not running"):
        answer(engine)
