"""Find stop strings in text that arrives in pieces, and never show any part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches for several stop strings. Cut there, the text is the same however it was split into pieces.

    The stop that is complete first wins; of two that end together, the longer. Text that may yet become a stop is
    held back. Cost: one step of an automaton per character and stop, whatever the length of the stops.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self._hit: str | None = None

    @property
    def hit(self) -> str | None:
        """The stop that was found; from then on there is nothing more to show."""
        return self._hit

    def feed(self, piece: str) -> str:
        """Take more text and return what can be shown now."""
        if self._hit is not None:
            return ""
        text = self._held + piece
        hit, end = self._scan(piece)
        if hit is not None:
            self._hit, self._held = hit, ""
            return text[: len(text) - len(piece) + end - len(hit)]
        num_held = max((automaton.num_matched for automaton in self._automata), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """No more text will come: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _scan(self, piece: str) -> tuple[str | None, int]:
        """The first stop complete in `piece` and where it ends there."""
        if not self._automata:
            return None, 0
        for idx, char in enumerate(piece):
            complete = [automaton.stop for automaton in self._automata if automaton.advance(char)]
            if complete:
                return max(complete, key=len), idx + 1
        return None, 0


class _Automaton:
    """How much of one stop the text so far ends with.

    Source: Knuth, Morris and Pratt, Fast Pattern Matching in Strings, 1977.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = _fallbacks(stop)

    def advance(self, char: str) -> bool:
        """Take one character; True when the stop is complete."""
        while self.num_matched and self.stop[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched - 1]
        if self.stop[self.num_matched] == char:
            self.num_matched += 1
        return self.num_matched == len(self.stop)


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    fallback = [0] * len(stop)
    matched = 0
    for idx in range(1, len(stop)):
        while matched and stop[matched] != stop[idx]:
            matched = fallback[matched - 1]
        matched += stop[matched] == stop[idx]
        fallback[idx] = matched
    return fallback
