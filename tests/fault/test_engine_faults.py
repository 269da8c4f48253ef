"""The whole engine when reads fail, files change, weights are broken or the caller leaves: a typed error that says
what was missing, no hang, and every byte given back."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bench.random_model import write_random_model
from pipo.base.config import SCHEDULE_NAMES
from pipo.base.errors import (
    Cancelled,
    ComputeError,
    FileChanged,
    PipoError,
    ReadFailed,
    TransferError,
    UnexpectedEof,
    UnsupportedModel,
    UsageError,
)
from pipo.base.tensor_type import TensorType
from pipo.compute.repack import RepackBuffer
from pipo.engine import Engine
from pipo.formats.checkpoint import open_checkpoint
from pipo.generation.request import FinishReason, SamplingParams
from pipo.pipeline import assembly
from pipo.tiers.ledger import Ledger
from pipo.transfer.disk import CLOSE_S
from pipo.transfer.files import Preadv
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.engines import PLENTY, smallest_ram_bytes, start_engine
from tests.support.tiny_models import SPECS, make_model, write_gguf
from tests.support.transfers import deadline

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = list(range(299, 320))  # of both vocabularies
SHORT = PROMPT[:3]  # one chunk: its pass reads every unit
SETTINGS: dict[str, Any] = {"prefill_chunk": 8, "context_tokens": 256}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with deadline(30):
        yield


@pytest.fixture(autouse=True)
def ledgers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ledger]]:
    """Of every engine of the test, which has closed them all: nothing is charged, nobody works any more."""
    made: list[Ledger] = []

    class Noted(Ledger):
        def __init__(self, limit_bytes: int) -> None:
            super().__init__(limit_bytes)
            made.append(self)

    monkeypatch.setattr(assembly, "Ledger", Noted)
    yield made
    assert [ledger.breakdown() for ledger in made] == [{}] * len(made)
    for thread in [t for t in threading.enumerate() if t.name.startswith(("pipo read", "compute"))]:
        thread.join(1.0)
        assert not thread.is_alive(), thread.name


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB in Q4_0; engines repack it where the CPU has kernels."""
    path = tmp_path_factory.mktemp("model") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    return path


@pytest.fixture(scope="module")
def smallest(original: Path) -> int:
    return smallest_ram_bytes(original, **SETTINGS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 tensors to read; the embeddings are the head."""
    path = tmp_path_factory.mktemp("model") / "tied.gguf"
    write_gguf(make_model(replace(SPECS["llama-tied"], num_layers=12)), path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(original.read_bytes())
    return copy


@pytest.fixture(params=["streamed", "resident"])
def ram_bytes(request: pytest.FixtureRequest, smallest: int) -> int:
    return smallest if request.param == "streamed" else PLENTY


def start(path: Path, ram_bytes: int, preadv: Preadv | None = None, **settings: Any) -> Engine:
    return start_engine(path, ram_bytes=ram_bytes, preadv=preadv, **{**SETTINGS, **settings})


def answer(engine: Engine, prompt: Sequence[int] = PROMPT) -> tuple[int, ...]:
    return engine.complete(prompt, GREEDY).token_ids


@pytest.fixture(scope="module")
def healthy(original: Path, smallest: int) -> tuple[int, ...]:
    with start(original, smallest) as engine:
        return answer(engine)


# reads


NTH = (1, 2, 3, 4, 5, 8, 13, 21, 34, 55, 89, 144)


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
        for piece in engine.stream(PROMPT, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)):
            pieces.append(piece)
            switch.is_broken = len(pieces) >= 2
    assert 2 <= len(pieces) < 200 and engine.report is not None
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="not running"):
        answer(engine)


# files


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"GGUF")
    os.utime(path, ns=(1, 1))


def exchange(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [cut, overwrite, exchange, remove])
def test_file_that_changes_between_requests(path: Path, ram_bytes: int, change: Callable[[Path], None]) -> None:
    with start(path, ram_bytes) as engine:
        answer(engine)
        change(path)
        for _ in range(2):
            with pytest.raises(FileChanged) as failed:
                answer(engine)
            assert failed.value.path == str(path) and failed.value.hint is not None


@pytest.mark.parametrize("change", [cut, exchange])
def test_file_that_changes_during_an_answer(path: Path, ram_bytes: int, change: Callable[[Path], None]) -> None:
    with start(path, ram_bytes) as engine, pytest.raises(FileChanged):
        for i, _ in enumerate(engine.stream(PROMPT, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))):
            if i == 1:
                change(path)


def test_file_that_is_cut_before_the_start(path: Path, smallest: int) -> None:
    """The header was read; then somebody truncates the file."""
    engine = start(path, smallest)
    with engine:
        plan = engine.plan
    assert plan is not None
    cut(path)
    with pytest.raises(PipoError, match=r"model\.gguf"):
        start(path, smallest)


# weights


def tiny(path: Path) -> Path:
    write_gguf(make_model(SPECS["llama"]), path)
    return path


def patch_tensor(path: Path, name: str, data: bytes) -> None:
    extent = open_checkpoint(path).manifest.tensors[name].extent
    with path.open("r+b") as stream:
        stream.seek(extent.offset)
        stream.write(data)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight", "blk.0.attn_q.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path: Path, name: str, value: float) -> None:
    """Sampling refuses what comes out, says what may be wrong, and goes on refusing."""
    path = tiny(tmp_path / "tiny.gguf")
    patch_tensor(path, name, struct.pack("<f", value) * 4)
    with start_engine(path) as engine:
        for _ in range(2):
            with pytest.raises(ComputeError, match="the model produced NaN") as failed:
                answer(engine)
            assert failed.value.hint is not None and "checksum" in failed.value.hint


@pytest.mark.parametrize("type_", [TensorType.I32, TensorType.F64, TensorType.I8])
def test_matrix_of_a_type_without_a_product(tmp_path: Path, type_: TensorType) -> None:
    """libggml would call a kernel that is not there."""
    path = tiny(tmp_path / "tiny.gguf")
    name = b"blk.1.attn_k.weight"
    data = bytearray(path.read_bytes())
    start_of_type = data.index(name) + len(name) + 4 + 2 * 8
    data[start_of_type : start_of_type + 4] = struct.pack("<I", type_)
    path.write_bytes(data)
    with pytest.raises(PipoError) as refused:
        start_engine(path)
    if type_ is TensorType.I32:  # as large as F32: the file is well formed
        assert isinstance(refused.value, UnsupportedModel)
        assert f"blk.1.attn_k.weight is {type_.name}" in str(refused.value)


# leaving


LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


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


def test_finishing_after_an_early_leave_is_reported(original: Path, smallest: int) -> None:
    with start(original, smallest) as engine:
        stream = engine.stream(PROMPT, LONG)
        next(stream)
        stream.close()
        assert engine.complete(PROMPT, GREEDY).finish_reason is FinishReason.LENGTH
        assert engine.report is not None and engine.report.timing.cached_tokens == len(PROMPT) - 1


class Gate:
    """A preadv that gets stuck once `num_left` more reads have begun, until it is opened."""

    def __init__(self) -> None:
        self.num_left: int | None = None
        self.num_stuck = 0
        self._opened = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            is_stuck = self.num_left == 0
            self.num_stuck += is_stuck
            if self.num_left:
                self.num_left -= 1
        if is_stuck:
            self._opened.wait()
        return os.preadv(fd, buffers, offset)

    def open(self) -> None:
        self._opened.set()


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
