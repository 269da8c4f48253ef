"""Which of many texts stand at a place: the longest, at a cost that hostile texts cannot drive up."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable

_FIRST_WIDTH = 64  # characters; longer than special tokens are


class PrefixTexts:
    """Texts in order, each linked to the longest other one that it begins with.

    All texts between a text and what begins with it begin with it too. So the longest that stands at a place is the
    last one not after what stands there, or one that this one begins with. A trie would need a step a character.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(texts)
        self._begins = array("i", [-1])  # of text i - 1, so that -1 links to itself
        self._jumps = array("i", [-1])
        self._link()

    def longest_at(self, text: str, start: int) -> str | None:
        """The longest of the texts that `text` has at `start`. Cost: logarithmic in their number, 1 µs for 6,000."""
        idx = self._last_until(text, start)
        while idx >= 0 and not text.startswith(self._texts[idx], start):
            jump = self._jumps[idx + 1]
            is_too_long = jump >= 0 and not text.startswith(self._texts[jump], start)
            idx = jump if is_too_long else self._begins[idx + 1]
        return self._texts[idx] if idx >= 0 else None

    def _last_until(self, text: str, start: int) -> int:
        """Of the texts not after `text[start:]`, the last; only as much of it is copied as decides."""
        width = _FIRST_WIDTH
        while True:
            head = text[start : start + width]
            idx = bisect_right(self._texts, head)
            if len(head) < width or idx == len(self._texts) or not self._texts[idx].startswith(head):
                return idx - 1
            width *= 4

    def _link(self) -> None:
        """Links to the next shorter one, and far ones as well: a way back of n links takes 2 log n steps.

        Source: Myers, An applicative random-access stack, 1983.
        """
        depths = array("i", [0])
        idx = -1
        for this, text in enumerate(self._texts):
            while idx >= 0 and not text.startswith(self._texts[idx]):
                idx = self._begins[idx + 1]
            jump = self._jumps[idx + 1]
            far = self._jumps[jump + 1]
            is_even = depths[idx + 1] - depths[jump + 1] == depths[jump + 1] - depths[far + 1]
            self._begins.append(idx)
            self._jumps.append(far if is_even else idx)
            depths.append(depths[idx + 1] + 1)
            idx = this
