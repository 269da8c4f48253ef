"""However the text is split, the matcher shows what a search of the whole text would."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipo.generation.stops import StopMatcher

SMALL_TEXT = st.text(alphabet="ab\n", max_size=40)  # few letters: many partial matches
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=4)


def search(stops: list[str], text: str) -> tuple[str, str | None]:
    """What may be shown, and the stop: the first to end, and of those the first to begin."""
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    begin, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
    return text[:begin], stop


@given(stops=STOPS, text=SMALL_TEXT, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_any_splitting_shows_the_same(stops: list[str], text: str, cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    output = "".join(matcher.feed(text[a:b]) for a, b in pairwise(bounds))
    output += matcher.flush()
    assert (output, matcher.hit) == search(stops, text)


@given(stops=STOPS, pieces=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=8))
def test_holds_back_no_more_than_a_possible_stop(stops: list[str], pieces: list[str]) -> None:
    matcher, text, output = StopMatcher(stops), "", ""
    for piece in pieces:
        text, output = text + piece, output + matcher.feed(piece)
        if matcher.hit is not None:
            return
        held = text[len(output) :]
        assert text.startswith(output)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
