"""However an answer is cut into pieces, it is the same text, thinking and calls; and no text is lost that is no part of
a call.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.text.answer_formats import answer_format_of
from pipo.text.tool_calls import answer_reader
from tests.unit.test_tool_calls import ANSWERS, TEMPLATES, TOOLS, read

_MARKERS = sorted({marker for template in TEMPLATES.values() for marker in answer_format_of(template).markers})
_BITS = st.sampled_from(
    [
        *_MARKERS,
        *(marker[:-1] for marker in _MARKERS),
        '{"name": "now"',
        ', "arguments": {}}',
        "{}",
        "[",
        "]",
        " ",
        "\n",
        "a",
    ]
)
TEXTS = st.lists(st.one_of(_BITS, st.text(max_size=3)), max_size=12).map("".join)


def cut(family: str, text: str, cuts: list[int]) -> tuple[str, str, list[tuple[str, str]]]:
    """Text, thinking and calls of an answer that comes in these pieces."""
    reader = answer_reader(answer_format_of(TEMPLATES[family]), TOOLS)
    ends = sorted({min(each, len(text)) for each in cuts} | {len(text)})
    starts = [0, *ends[:-1]]
    deltas = [*(reader.feed(text[a:b]) for a, b in zip(starts, ends, strict=True)), reader.finish()]
    calls = [(call.name, call.arguments) for delta in deltas for call in delta.calls]
    return "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas), calls


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 80), max_size=20))
def test_pieces_do_not_matter(family: str, text: str, cuts: list[int]) -> None:
    assert cut(family, text, cuts) == cut(family, text, [])


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(blacklist_characters="<[{｜"), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=9),
)
def test_plain_text_is_left_alone(family: str, text: str, cuts: list[int]) -> None:
    assert cut(family, text, cuts) == (text, "", [])


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_calls_raise_nothing(family: str, data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from(ANSWERS[family]))[0]
    at = data.draw(st.integers(0, len(answer)))
    read(family, answer[:at] + data.draw(st.text(max_size=3)) + answer[at + 1 :], 3, hides=False)
