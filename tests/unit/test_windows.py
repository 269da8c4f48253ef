"""Windows of a text: what is computed, what is scored, in which passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.generation.windows import Windows


def test_the_second_half_of_each_window_is_scored_and_its_first_token_replaced() -> None:
    windows = Windows(range(100, 120), size=8, num_windows=2, begin_id=7)
    assert (windows.first, windows.scored_each, windows.num_scored, windows.num_computed) == (4, 3, 6, 14)
    assert [windows.inputs(i) for i in range(2)] == [
        [7, 101, 102, 103, 104, 105, 106],
        [7, 109, 110, 111, 112, 113, 114],
    ]
    # the logits of positions 4, 5 and 6 foretell tokens 5, 6 and 7
    assert [windows.next_token(i, p) for i in range(2) for p in (4, 5, 6)] == [105, 106, 107, 113, 114, 115]
    assert list(windows.scored_tokens()) == [105, 106, 107, 113, 114, 115]
    assert Windows(range(8), 8, 1).inputs(0) == [0, 1, 2, 3, 4, 5, 6]


@given(st.integers(4, 600), st.integers(1, 600), st.integers(1, 600))
def test_passes_cover_a_window_once_within_their_limits(size: int, max_tokens: int, max_outputs: int) -> None:
    windows = Windows([], size, 1)
    passes = list(windows.passes(max_tokens, max_outputs))
    assert [p for each in passes for p in range(each.start, each.stop)] == list(range(size - 1))
    assert [p for each in passes for p in each.outputs] == list(range(size // 2, size - 1))
    assert all(0 < each.num_tokens <= max_tokens and len(each.outputs) <= max_outputs for each in passes)
    assert all(set(each.outputs) <= set(range(each.start, each.stop)) for each in passes)


@pytest.mark.parametrize(("limits", "num"), [((511, 255), 1), ((512, 256), 1), ((511, 128), 2), ((128, 64), 6)])
def test_as_few_passes_as_the_limits_allow(limits: tuple[int, int], num: int) -> None:
    assert len(list(Windows([], 512, 1).passes(*limits))) == num
