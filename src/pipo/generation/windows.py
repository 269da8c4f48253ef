"""A text's tokens cut into windows, of each of which the second half is scored, as llama.cpp's perplexity does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WindowPass:
    """Positions `start` to `stop` of a window, computed at once; `outputs` are those of them that are scored."""

    start: int
    stop: int
    outputs: range

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Windows:
    """The first `num_windows` runs of `size` tokens each, computed one by one from an empty context.

    In place of a window's first token stands `begin_id`, where the model adds one. What comes after the positions from
    `first` on is scored, but for the last one, which nothing comes after: it is not computed.
    Source: llama.cpp, tools/perplexity/perplexity.cpp, `perplexity`.
    """

    token_ids: Sequence[int]
    size: int
    num_windows: int
    begin_id: int | None = None

    @property
    def first(self) -> int:
        return self.size // 2

    @property
    def scored_each(self) -> int:
        return self.size - 1 - self.first

    @property
    def num_scored(self) -> int:
        return self.num_windows * self.scored_each

    @property
    def num_computed(self) -> int:
        """Tokens that pass through the model."""
        return self.num_windows * (self.size - 1)

    def inputs(self, window_idx: int) -> list[int]:
        """What is computed of a window."""
        start = window_idx * self.size
        ids = list(self.token_ids[start : start + self.size - 1])
        return ids if self.begin_id is None else [self.begin_id, *ids[1:]]

    def next_token(self, window_idx: int, position: int) -> int:
        """What stands in the text after this position of a window."""
        return self.token_ids[window_idx * self.size + position + 1]

    def scored_tokens(self) -> Iterator[int]:
        """In the order in which they are scored."""
        for start in range(0, self.num_windows * self.size, self.size):
            yield from self.token_ids[start + self.first + 1 : start + self.size]

    def passes(self, max_tokens: int, max_outputs: int) -> Iterator[WindowPass]:
        """Of one window: the fewest that take so many tokens, and scored ones among them, at most."""
        start, end = 0, self.size - 1
        while start < end:
            stop = min(start + max_tokens, max(start, self.first) + max_outputs, end)
            yield WindowPass(start, stop, range(max(start, self.first), stop))
            start = stop
