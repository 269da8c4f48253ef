"""The Python API as a program uses it: what it takes, and what it says to what it does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipo
from pipo.base.errors import UsageError

GREEDY = pipo.SamplingParams(max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[pipo.LLM]:
    with pipo.LLM(smollm2_path, ram=8_000_000_000, context_tokens=256) as llm:
        yield llm


def test_one_string_is_one_prompt(llm: pipo.LLM) -> None:
    (one,) = llm.generate("The capital of France is", GREEDY)
    assert one.token_ids == llm.generate(["The capital of France is"], GREEDY)[0].token_ids


def test_prompts_that_share_sweeps_get_the_same_answers(llm: pipo.LLM, smollm2_path: Path) -> None:
    prompts = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time", "Water is made of", "My name is"]
    want = [answer.text for answer in llm.generate(prompts, GREEDY)]
    with pipo.LLM(smollm2_path, ram=8_000_000_000, context_tokens=256, num_sequences=2) as several:
        assert [answer.text for answer in several.generate(prompts, GREEDY)] == want


def test_stop_strings_in_a_list() -> None:
    assert pipo.SamplingParams(stop=["a", "b"]) == pipo.SamplingParams(stop=("a", "b"))


@pytest.mark.parametrize("prompt", [None, b"bytes", 5])
def test_what_is_no_prompt(llm: pipo.LLM, prompt: Any) -> None:
    with pytest.raises(pipo.PipoError, match="a prompt must be a string"):
        next(iter(llm.engine.generate(prompt)))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"rma": "1GB"}, "unknown setting 'rma'"),
        ({"threads": "2"}, "threads must be a whole number"),
        ({"context_tokens": 100.5}, "context_tokens must be a whole number"),
    ],
)
def test_settings_that_are_none(smollm2_path: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(pipo.PipoError, match=what):
        pipo.load(smollm2_path, **settings)


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.make_plan(),
        lambda engine: engine.smallest_ram_bytes(256),
        lambda engine: engine.complete([1, 2], GREEDY),
    ],
)
def test_a_closed_engine_says_so(smollm2_path: Path, use: Callable[[pipo.Engine], object]) -> None:
    """ggml would end the process."""
    engine = pipo.load(smollm2_path, ram="8GB", context_tokens=256)
    plan = engine.plan
    assert plan is not None
    with pytest.raises(UsageError, match="running already"):
        engine.start(plan)
    engine.close()
    with pytest.raises(UsageError):
        use(engine)
