"""Passes that are arithmetic: logits are a function of all tokens of a sequence and its adapters, so that whoever mixes
up sequences, positions or adapters gets other answers. They keep what a KV cache would keep, and nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipo.base.errors import PipoError
from pipo.pipeline.adapters import Weights
from pipo.pipeline.spans import Span

VOCAB = 64
END = 0  # the id that ends an answer

Row = tuple[int, str]  # a token and the adapters it was computed with


def logits_after(rows: Sequence[Row]) -> npt.NDArray[np.float32]:
    """Shape: (VOCAB). Any other rows give others."""
    seed = zlib.crc32(repr(list(rows)).encode())
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


def answer_alone(prompt: Sequence[int], num_tokens: int, weights: Weights | None = None) -> list[int]:
    """Greedy, without the token that ends it."""
    kind, tokens = str(weights or {}), list(prompt)
    for _ in range(num_tokens):
        best = int(logits_after([(token, kind) for token in tokens]).argmax())
        if best == END:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


@dataclass
class ArithmeticPasses:
    """`fails` is asked before every pass for an error to raise, `on_pass` hears of every pass while it runs."""

    num_sequences: int = 3
    max_tokens: int = 8
    can_copy_rows: bool = True
    fails: Callable[[], PipoError | None] = lambda: None
    on_pass: Callable[[Sequence[Span]], None] = lambda spans: None
    passes: list[list[Span]] = field(default_factory=list)
    num_copied: int = 0

    def __post_init__(self) -> None:
        self.max_outputs = self.num_sequences
        self.rows: list[list[Row]] = [[] for _ in range(self.num_sequences)]
        self._kinds = [str({})] * self.num_sequences

    def run_spans(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        assert spans and sum(len(span.token_ids) for span in spans) <= self.max_tokens
        assert len({span.sequence for span in spans}) == len(spans), "a sequence has one span"
        assert sum(span.wants_logits for span in spans) <= self.max_outputs
        self.passes.append(list(spans))
        self.on_pass(spans)
        for span in spans:
            assert span.token_ids and span.start <= len(self.rows[span.sequence]), "a gap in the KV cache"
            del self.rows[span.sequence][span.start :]
        error = self.fails()
        if error is not None:
            raise error
        for span in spans:
            self.rows[span.sequence] += [(token, self._kinds[span.sequence]) for token in span.token_ids]
        found = [logits_after(self.rows[span.sequence]) for span in spans if span.wants_logits]
        return np.stack(found) if found else np.empty((0, 0), np.float32)

    def run_rows(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int], sequence: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        assert len(outputs) <= self.max_outputs
        self.run_spans([Span(sequence, start, token_ids, wants_logits=False)])
        rows = self.rows[sequence]
        return (logits_after(rows[: start + output + 1]) for output in outputs)

    def release(self, sequence: int) -> None:
        self.rows[sequence].clear()

    def copy_rows(self, source: int, target: int, num_positions: int) -> None:
        assert self.can_copy_rows and source != target and num_positions <= len(self.rows[source])
        self.rows[target] = self.rows[source][:num_positions]
        self.num_copied += num_positions

    def use_adapters(self, weights: Sequence[Weights]) -> None:
        self._kinds = [str(each) for each in weights]

    def can_resume(self, position: int) -> bool:
        return True

    def embed(self, token_ids: Sequence[int], sequence: int) -> npt.NDArray[np.float32]:
        self.rows[sequence] = [(token, self._kinds[sequence]) for token in token_ids]
        error = self.fails()
        if error is not None:
            raise error
        return logits_after(self.rows[sequence])

    @property
    def num_computed(self) -> int:
        return sum(len(span.token_ids) for spans in self.passes for span in spans)
