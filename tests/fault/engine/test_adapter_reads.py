"""Adapters that cannot be loaded: a typed error, and an engine that goes on as it was."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from pipo.base.adapter import AdapterChoice
from pipo.base.errors import FileChanged, MalformedFile, ModelNotFound, OverBudget, PipoError, ReadFailed, UnexpectedEof
from pipo.engine import Engine
from pipo.pipeline import adapters, graph_room
from pipo.transfer.files import UncachedFile
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.engines import PLENTY
from tests.support.random_adapters import write_random_adapter
from tests.support.small_engine import answer, start


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    return write_random_adapter(original, tmp_path / "style.gguf", rank=4, strength=1.0)


def assert_unchanged(engine: Engine, before: dict[str, int], healthy: tuple[int, ...]) -> None:
    assert not engine.adapters
    assert engine.ledger_breakdown == before
    assert answer(engine) == healthy


@pytest.mark.parametrize(("fault", "kind"), [(Fault.FAIL, ReadFailed), (Fault.END, UnexpectedEof)])
@pytest.mark.parametrize("nth", [1, 2, 9, 56])
def test_nth_read_fails(
    original: Path, adapter: Path, healthy: tuple[int, ...], nth: int, fault: Fault, kind: type[PipoError]
) -> None:
    """Of 56 tensors. Named at the start it keeps the engine from starting; added later it changes nothing."""
    broken = partial(UncachedFile, preadv=faulty_preadv(fault, nth))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "UncachedFile", broken)
        with pytest.raises(kind) as failed:
            start(original, PLENTY, lora=(AdapterChoice(adapter),))
        assert str(adapter) in str(failed.value)
    with start(original, PLENTY) as engine:
        before = engine.ledger_breakdown
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapters, "UncachedFile", partial(UncachedFile, preadv=faulty_preadv(fault, nth)))
            with pytest.raises(kind):
                engine.add_adapter(adapter)
        assert_unchanged(engine, before, healthy)
        assert answer(engine) == healthy
        assert engine.add_adapter(adapter) == "style"
        assert answer(engine) != healthy


@pytest.mark.parametrize("num_bytes", [0, 10, 1000, 20_000])
def test_truncated(original: Path, adapter: Path, healthy: tuple[int, ...], num_bytes: int) -> None:
    os.truncate(adapter, num_bytes)
    with start(original, PLENTY) as engine:
        before = engine.ledger_breakdown
        with pytest.raises(MalformedFile):
            engine.add_adapter(adapter)
        assert_unchanged(engine, before, healthy)


def test_replaced_between_plan_and_start(original: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = adapters.AdapterStore.load

    def late(self: adapters.AdapterStore, named: adapters.NamedAdapter) -> adapters.LoadedAdapter:
        raw = adapter.read_bytes()
        adapter.unlink()
        adapter.write_bytes(raw)
        return load(self, named)

    monkeypatch.setattr(adapters.AdapterStore, "load", late)
    with pytest.raises(FileChanged):
        start(original, PLENTY, lora=(AdapterChoice(adapter),))


def test_not_there(original: Path, healthy: tuple[int, ...], tmp_path: Path) -> None:
    with start(original, PLENTY) as engine:
        before = engine.ledger_breakdown
        with pytest.raises(ModelNotFound):
            engine.add_adapter(tmp_path / "nothing")
        assert_unchanged(engine, before, healthy)


def test_no_room(original: Path, smallest: int, adapter: Path, healthy: tuple[int, ...]) -> None:
    """The error names a budget that has room, to the MiB."""
    with start(original, smallest) as engine:
        before = engine.ledger_breakdown
        with pytest.raises(OverBudget, match=r"adapter style needs .* the plan leaves 0 B") as failed:
            engine.add_adapter(adapter)
        assert_unchanged(engine, before, healthy)
    assert failed.value.smallest_bytes is not None and "hint: --ram " in str(failed.value)


def test_graphs_that_get_no_memory(
    original: Path, adapter: Path, healthy: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all else was loaded: everything is given back."""
    with start(original, PLENTY) as engine:
        before = engine.ledger_breakdown
        reserve = graph_room.StageGraphs.reserve
        failing = [True]

        def refuse_once(self: graph_room.StageGraphs, *arguments: object) -> None:
            if failing:
                failing.clear()
                raise MemoryError
            reserve(self, *arguments)

        monkeypatch.setattr(graph_room.StageGraphs, "reserve", refuse_once)
        with pytest.raises(MemoryError):
            engine.add_adapter(adapter)
        assert_unchanged(engine, before, healthy)
        engine.add_adapter(adapter)
        assert answer(engine) != healthy
