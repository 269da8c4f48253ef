"""Stop strings, by hand. The property test compares every splitting with a plain search."""

from __future__ import annotations

import pytest

from pipo.generation.stops import StopMatcher


def shown(stops: tuple[str, ...], *pieces: str) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    texts = [matcher.feed(piece) for piece in pieces]
    return [*texts, matcher.flush()], matcher.hit


@pytest.mark.parametrize(
    ("stops", "pieces", "texts", "hit"),
    [
        ((), ("a", "b"), ["a", "b", ""], None),
        (("END",), ("xEN", "D y"), ["x", "", ""], "END"),
        (("END",), ("xEN", "d y"), ["x", "ENd y", ""], None),
        (("END",), ("x", "EN"), ["x", "", "EN"], None),
        (("END",), ("END",), ["", ""], "END"),
        (("\n\n",), ("a\n", "b\n", "\nc"), ["a", "\nb", "", ""], "\n\n"),
        (("aab",), ("aa", "ab"), ["", "a", ""], "aab"),
        (("bc", "abcd"), ("abcd",), ["a", ""], "bc"),  # complete first
        (("bc", "abc"), ("abc",), ["", ""], "abc"),  # complete together: nothing of the longer is shown
        (("猫",), ("a猫b",), ["a", ""], "猫"),
    ],
)
def test_shows_all_but_the_stop(
    stops: tuple[str, ...], pieces: tuple[str, ...], texts: list[str], hit: str | None
) -> None:
    assert shown(stops, *pieces) == (texts, hit)


def test_nothing_after_a_hit() -> None:
    assert shown(("S",), "aSb", "c", "S") == (["a", "", "", ""], "S")
