"""Adapters that are added and removed between requests: the same answers as with those of the start, and no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.random_mixture import write_random_mixture
from bench.random_model import write_random_model
from pipo.base.adapter import AdapterChoice
from pipo.base.errors import OverBudget, UsageError
from pipo.engine import Engine
from pipo.generation.request import Completion, SamplingParams
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.random_adapters import write_random_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)  # which show what tokens may not
PROMPT = list(range(100, 130))
SETTINGS = {"prefill_chunk": 8, "max_outputs": 8, "context_tokens": 256}


@pytest.fixture(scope="module", params=["dense", "mixture"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("models")
    if request.param == "mixture":
        write_random_mixture(folder / "model.gguf", "smoke-moe")
    else:
        write_random_model(folder / "model.gguf", "smoke", "q4_0")
    for seed, (name, rank) in enumerate({"a": 4, "b": 16}.items()):
        write_random_adapter(folder / "model.gguf", folder / f"{name}.gguf", rank=rank, strength=1.0, seed=seed)
    return folder


def start(folder: Path, *adapters: str, **settings: object) -> Engine:
    lora = tuple(AdapterChoice(folder / f"{name}.gguf") for name in adapters)
    return start_engine(folder / "model.gguf", lora=lora, **{**SETTINGS, **settings})


def bits(engine: Engine, **choice: object) -> np.ndarray:
    return engine.logits(PROMPT, **choice).view(np.uint32)


def test_added_later_is_as_from_the_start(folder: Path) -> None:
    with start(folder, "a", "b") as engine:
        both, only_a, none = bits(engine), bits(engine, adapters="a"), bits(engine, adapters={})
    with start(folder, "b", "a") as engine:
        only_b = bits(engine, adapters="b")
    with start(folder) as engine:
        np.testing.assert_array_equal(bits(engine), none)
        before = engine.ledger_breakdown
        assert engine.add_adapter(folder / "a.gguf") == "a"
        np.testing.assert_array_equal(bits(engine), only_a)
        assert engine.add_adapter(folder / "b.gguf", scale=1) == "b"
        np.testing.assert_array_equal(bits(engine), both)
        assert engine.ledger_breakdown["adapters"] > before.get("adapters", 0)
        engine.remove_adapter("a")
        np.testing.assert_array_equal(bits(engine), only_b)
        engine.remove_adapter("b")
        np.testing.assert_array_equal(bits(engine), none)
        assert list(engine.adapters) == []
        after = engine.ledger_breakdown
        assert {name: after[name] for name in before if name != "activations"} == {
            name: size for name, size in before.items() if name != "activations"
        }


def test_what_was_computed_with_others_is_computed_again(folder: Path) -> None:
    with start(folder) as engine:
        first = engine.complete(PROMPT, GREEDY)
        assert engine.complete(PROMPT, GREEDY).usage.cached_tokens == len(PROMPT) - 1
        engine.add_adapter(folder / "a.gguf")
        changed = engine.complete(PROMPT, GREEDY)
        assert changed.usage.cached_tokens == 0 and changed.tokens != first.tokens
        assert engine.complete(PROMPT, GREEDY).usage.cached_tokens == len(PROMPT) - 1
        assert engine.complete(PROMPT, GREEDY, adapters={"a": 0.5}).usage.cached_tokens == 0
        without = engine.complete(PROMPT, GREEDY, adapters={})
        assert without.usage.cached_tokens == 0 and without.tokens == first.tokens
        assert engine.complete(PROMPT, GREEDY, adapters={"a": 0}).usage.cached_tokens == len(PROMPT) - 1
        engine.complete(PROMPT, GREEDY)
        engine.remove_adapter("a")
        again = engine.complete(PROMPT, GREEDY)
        assert again.usage.cached_tokens == 0 and again.tokens == first.tokens


def test_the_same_one_twice_has_a_name_of_its_own(folder: Path) -> None:
    with start(folder, "a") as engine:
        assert engine.add_adapter(folder / "a.gguf", scale=2) == "a-2"
        with start(folder, "a") as other:
            np.testing.assert_array_equal(bits(engine, adapters="a"), bits(other))
        twice = engine.logits(PROMPT, adapters={"a": 1.0, "a-2": 1.0})
        double = engine.logits(PROMPT, adapters={"a": 2.0})
        # added in another order, and from there on rounded to 8 bits as Q4_0 wants its activations
        assert np.std(twice - double) < 0.02 * np.std(double) < np.std(double - engine.logits(PROMPT, adapters="a"))
        engine.remove_adapter("a")
        assert engine.add_adapter(folder / "a.gguf") == "a"
        assert list(engine.adapters) == ["a-2", "a"] and engine.adapters[next(iter(engine.adapters))].scale == 2


def test_added_within_what_the_plan_has_left(folder: Path) -> None:
    """A plan that keeps every weight in RAM has some left; the error before that names how much is needed."""
    with start(folder) as engine:
        assert engine.plan is not None
        planned = engine.plan.placement.num_bytes
    with start(folder, ram_bytes=planned) as engine:
        assert engine.plan is not None and engine.plan.placement.num_bytes == planned
        want = bits(engine)
        with pytest.raises(OverBudget) as failed:
            engine.add_adapter(folder / "b.gguf")
        np.testing.assert_array_equal(bits(engine), want)
    assert failed.value.smallest_bytes is not None
    with start(folder, ram_bytes=failed.value.smallest_bytes) as engine:
        assert engine.plan is not None
        assert engine.plan.placement.num_bytes == planned
        engine.add_adapter(folder / "b.gguf")
        assert sum(engine.ledger_breakdown.values()) <= failed.value.smallest_bytes
        with pytest.raises(OverBudget):
            engine.add_adapter(folder / "a.gguf")
        engine.remove_adapter("b")
        engine.add_adapter(folder / "a.gguf")
        assert len(engine.complete(PROMPT, GREEDY).tokens) == GREEDY.max_tokens
        engine.remove_adapter("a")
        np.testing.assert_array_equal(bits(engine), want)


def test_a_plan_counts_those_it_begins_with(folder: Path) -> None:
    smallest = smallest_ram_bytes(folder / "model.gguf", **SETTINGS)
    with pytest.raises(OverBudget, match="adapters") as failed:
        start(folder, "b", ram_bytes=smallest)
    assert failed.value.smallest_bytes is not None
    with start(folder, "b", ram_bytes=failed.value.smallest_bytes) as engine:
        assert len(engine.complete(PROMPT, GREEDY).tokens) == GREEDY.max_tokens
        assert engine.ledger_breakdown["adapters"] >= (folder / "b.gguf").stat().st_size * 0.9


@pytest.mark.parametrize("choice", ["c", {"c": 1.0}, {"a": float("nan")}, {"a": "1"}, {"a": True}, 5, ["a"]])
def test_choices_that_are_none(choice: object, folder: Path) -> None:
    with start(folder, "a", num_sequences=2) as engine:
        for ask in (
            lambda: engine.logits(PROMPT, adapters=choice),
            lambda: engine.complete(PROMPT, GREEDY, adapters=choice),
            lambda: engine.complete_batch([PROMPT] * 2, GREEDY, adapters=[None, choice]),
        ):
            with pytest.raises(UsageError):
                ask()
        for wrong in ("a", [None], {"a": 1.0}):
            with pytest.raises(UsageError, match="adapters of 2 prompts must be a list of as many"):
                engine.complete_batch([PROMPT] * 2, GREEDY, adapters=wrong)
        with pytest.raises(UsageError, match=r"there is no adapter 'c'\n\nhint: loaded are: a"):
            engine.remove_adapter("c")


def is_same(a: Completion, b: Completion) -> bool:
    """But for rounding: rows of several sequences go through other kernels than one alone."""
    found = [[token.logprob for token in each.tokens] for each in (a, b)]
    return a.token_ids == b.token_ids and np.allclose(*found, atol=0.05)


def test_batches_leave_nothing_to_single_requests(folder: Path) -> None:
    with start(folder, "a", num_sequences=2) as engine:
        alone = engine.complete(PROMPT, GREEDY, adapters={})
        batch = engine.complete_batch([PROMPT, PROMPT], GREEDY, adapters=["a", {}])
        assert is_same(batch[0], engine.complete(PROMPT, GREEDY)) and not is_same(batch[0], alone)
        again = engine.complete(PROMPT, GREEDY, adapters={})
        assert is_same(batch[1], alone) and again.tokens == alone.tokens
        default = engine.complete_batch([PROMPT, PROMPT], GREEDY)
        assert all(is_same(each, batch[0]) for each in default)
