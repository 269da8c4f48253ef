"""Whose tokens a pass computes, and which of them share an attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipo.kvcache.cache import KvShape, kv_rows_class
from pipo.models.stage import KvGroup, ShapeClass

MAX_GROUPS = 8  # of a pass: each adds nodes to its graphs, which take memory
# what an attention of its own costs, in masked rows that a query passes over: 50 us against 0.04 us a row of 32 heads
_GROUP_ROWS = 1280


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a pass, at positions start, start + 1, …"""

    sequence: int
    start: int
    token_ids: Sequence[int]
    wants_logits: bool  # of its last token

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Positions that the sequence has after the pass."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """One span, or spans of one token each, ascending, whose sequences lie side by side in the cache from `first` on.
    Of those `num_sequences`, the ones that have no span take part in vain.
    """

    first: int
    num_sequences: int
    spans: tuple[Span, ...]

    @staticmethod
    def of(spans: Sequence[Span]) -> SpanGroup:
        """From the first sequence to the last."""
        first = spans[0].sequence
        return SpanGroup(first, spans[-1].sequence - first + 1, tuple(spans))

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_queries(self) -> int:
        """Rows of its mask."""
        return self.num_sequences if self.num_sequences > 1 else self.num_tokens

    @property
    def num_kv_rows(self) -> int:
        """A whole class, of the longest sequence."""
        return kv_rows_class(max(span.end for span in self.spans))

    @property
    def is_spread(self) -> bool:
        """Some sequences have no token."""
        return self.num_queries > self.num_tokens

    @property
    def queries(self) -> list[int]:
        """Of several sequences, the places of those that have a token."""
        return [span.sequence - self.first for span in self.spans]

    def shape(self, stride_rows: int) -> KvGroup:
        stride = stride_rows if self.num_sequences > 1 else 0
        return KvGroup(self.num_tokens, self.num_kv_rows, self.num_sequences, stride)


@dataclass(frozen=True, slots=True)
class PassRows:
    """The tokens of a pass, group by group: those that are the only one of their sequence come first."""

    groups: tuple[SpanGroup, ...]

    @staticmethod
    def of(spans: Sequence[Span], max_groups: int = MAX_GROUPS) -> PassRows:
        """Any number of spans, of a sequence each, in groups that cost least."""
        singles = sorted((span for span in spans if span.num_tokens == 1), key=lambda span: span.sequence)
        longer = [SpanGroup(span.sequence, 1, (span,)) for span in spans if span.num_tokens > 1]
        return PassRows((*_grouped(singles, max(max_groups - len(longer), 1)), *longer))

    def parts(self, num_sequences: int, max_groups: int = MAX_GROUPS) -> list[PassRows]:
        """Cut, in the order of the tokens, into as few as have all their sequences within so many side by side."""
        parts: list[list[Span]] = []
        for span in self.spans:
            together = [each.sequence for each in (*parts[-1], span)] if parts else []
            if together and max(together) - min(together) < num_sequences:
                parts[-1].append(span)
            else:
                parts.append([span])
        return [PassRows.of(part, max_groups) for part in parts] if len(parts) > 1 else [self]

    def shape(self, kv: KvShape, num_outputs: int) -> ShapeClass:
        """Of its graphs."""
        groups = tuple(group.shape(kv.num_rows) for group in self.groups)
        return ShapeClass(self.num_tokens, groups, num_outputs, kv.type_k, kv.type_v, self.num_apart)

    @property
    def spans(self) -> Iterator[Span]:
        """In the order of the pass."""
        return (span for group in self.groups for span in group.spans)

    @property
    def token_ids(self) -> list[int]:
        return [token for span in self.spans for token in span.token_ids]

    @property
    def num_tokens(self) -> int:
        return sum(group.num_tokens for group in self.groups)

    @property
    def num_apart(self) -> int:
        """Tokens in front that are the only one of their sequence, where the pass has others besides."""
        num = sum(1 for span in self.spans if span.num_tokens == 1)
        return num if self.num_tokens > 1 else 0

    @property
    def num_positions(self) -> int:
        """That the longest sequence has after the pass."""
        return max(span.end for span in self.spans)

    @property
    def firsts(self) -> tuple[int, ...]:
        """The sequence that each group begins with."""
        return tuple(group.first for group in self.groups)

    @property
    def first(self) -> int:
        """Of its sequences."""
        return min(self.firsts)

    def last_rows(self) -> dict[int, int]:
        """By sequence, the row of its last token."""
        rows, end = {}, 0
        for span in self.spans:
            end += span.num_tokens
            rows[span.sequence] = end - 1
        return rows


def passes_of(spans: Sequence[Span], max_groups: int = MAX_GROUPS) -> list[list[Span]]:
    """As few passes as hold all of these: one, unless there are more longer spans than a pass has groups for."""
    singles = [span for span in spans if span.num_tokens == 1]
    longer = [span for span in spans if span.num_tokens > 1]
    most = max(max_groups - bool(singles), 1)
    if max_groups == 1:
        return [*([singles] if singles else []), *([span] for span in longer)]
    parts = [longer[first : first + most] for first in range(0, len(longer), most)] or [[]]
    return [[*singles, *parts[0]], *parts[1:]]


def _grouped(singles: Sequence[Span], most: int) -> list[SpanGroup]:
    """Neighbours together until an attention of their own is cheaper than to pass over rows that nobody sees."""
    groups = [SpanGroup.of([span]) for span in singles]
    while len(groups) > 1:
        dear, i = min((_added_rows(a, b), i) for i, (a, b) in enumerate(pairwise(groups)))
        if dear > 0 and len(groups) <= most:
            break
        groups[i : i + 2] = [SpanGroup.of([*groups[i].spans, *groups[i + 1].spans])]
    return groups


def _added_rows(a: SpanGroup, b: SpanGroup) -> int:
    """What one group costs more than the two."""
    together = b.first + b.num_sequences - a.first
    apart = a.num_kv_rows * a.num_sequences + b.num_kv_rows * b.num_sequences
    return max(a.num_kv_rows, b.num_kv_rows) * together - apart - _GROUP_ROWS
