"""The order of a window, and which rows have one answer."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipo.generation.request import GenerationRequest, SamplingParams
from pipo.jobs.grouping import SHARED_TOKENS, grouped, shared
from pipo.jobs.preparation import Prepared, key_of

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def _window(*prompts: list[int]) -> list[Prepared]:
    return [Prepared(i, GenerationRequest(tuple(prompt), GREEDY)) for i, prompt in enumerate(prompts)]


def test_what_begins_alike_stands_together_and_short_comes_first() -> None:
    a, b = list(range(100, 100 + SHARED_TOKENS)), list(range(200, 200 + SHARED_TOKENS))
    window = _window([*a, 1, 2, 3], [*b, 1], [*a, 9], [*b, 5, 6, 7, 8], [7], [*a, 4, 4])
    assert [each.row for each in grouped(window)] == [4, 2, 5, 0, 1, 3]


def test_what_all_share_makes_no_family() -> None:
    """Every row of a chat has the template's beginning: then length decides."""
    head = list(range(50))
    assert [each.row for each in grouped(_window([*head, 3, 3, 3], [*head, 1], [*head, 2, 2]))] == [1, 2, 0]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), max_size=30))
def test_grouping_is_an_order_of_the_same_rows(prompts: list[list[int]]) -> None:
    found = grouped(_window(*prompts))
    assert sorted(each.row for each in found) == list(range(len(prompts)))


def test_shared() -> None:
    assert shared([1, 2, 3], [1, 2, 4]) == 2
    assert shared([1, 2], [1, 2, 3]) == 2
    assert shared([], [1]) == 0


def test_only_answers_that_are_certain_are_shared() -> None:
    def key(prompt: tuple[int, ...] = (1, 2), **params: object) -> bytes | None:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 4, **params}
        return key_of(GenerationRequest(prompt, SamplingParams(**settings)))

    assert key() == key() is not None
    assert key((1, 23)) != key((12, 3)) and key() != key(max_tokens=5) and key() != key(stop=["x"])
    assert key(temperature=1.0) is None
    assert key(temperature=1.0, seed=3) == key(temperature=1.0, seed=3) is not None
