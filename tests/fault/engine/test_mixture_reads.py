"""A mixture of experts when reads fail: needed ones, guesses and those that fill free slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.random_mixture import write_random_mixture
from pipo.base.errors import ReadFailed, TransferError, UnexpectedEof
from pipo.engine import Engine
from pipo.generation.request import SamplingParams
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.engines import PLENTY, smallest_ram_bytes, start_engine
from tests.support.transfers import deadline

NTH = (1, 5, 21, 60, 61, 62, 63, 80, 120, 200, 300, 500)
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "mix.gguf"
    write_random_mixture(path, "smoke-moe")
    return path


@pytest.fixture(scope="module")
def smallest(mixture: Path) -> int:
    return smallest_ram_bytes(mixture, context_tokens=128)


def answer(engine: Engine) -> list[int]:
    return [token.token_id for token in engine.complete(range(300, 340), PARAMS).tokens]


@pytest.mark.parametrize(("fault", "kind"), [(Fault.FAIL, ReadFailed), (Fault.END, UnexpectedEof)])
@pytest.mark.parametrize("nth", NTH)
def test_nth_read_fails(mixture: Path, smallest: int, nth: int, fault: Fault, kind: type[TransferError]) -> None:
    preadv = faulty_preadv(fault, nth)
    with (
        deadline(60),
        pytest.raises(kind) as failed,
        start_engine(mixture, ram_bytes=smallest, preadv=preadv, context_tokens=128) as engine,
    ):
        for _ in range(3):
            answer(engine)
    assert failed.value.path == str(mixture) and f"offset {failed.value.offset}" in str(failed.value)


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.SLOW])
@pytest.mark.parametrize("is_roomy", [False, True])
def test_short_and_slow_reads_change_nothing(mixture: Path, smallest: int, fault: Fault, is_roomy: bool) -> None:
    ram = PLENTY if is_roomy else smallest
    with start_engine(mixture, context_tokens=128) as engine:
        want = answer(engine)
    preadv = faulty_preadv(fault, 40, for_ever=fault is Fault.SHORT, delay_s=0.01)
    with deadline(60), start_engine(mixture, ram_bytes=ram, preadv=preadv, context_tokens=128) as engine:
        assert answer(engine) == want
