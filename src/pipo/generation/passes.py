"""What the batcher asks of the pipeline: passes that mix sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.pipeline.adapters import Weights
from pipo.pipeline.spans import Span


class SpanPasses(Protocol):
    """Passes over the KV cache of several sequences. Threads: one at a time."""

    @property
    def max_tokens(self) -> int:
        """Of a pass, all its spans together; one for every sequence at least."""

    @property
    def max_outputs(self) -> int:
        """Tokens of a pass that may want logits; as many as there are sequences at least."""

    @property
    def num_sequences(self) -> int:
        """That have keys and values at a time."""

    def run_spans(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        """Logits (spans that want them, vocabulary), in the order of the spans, valid until the next pass.

        A sequence has one span at most, and afterwards the positions before and in it, no later ones; after an error
        those before it. Raises TransferError, ComputeError, Cancelled.
        """

    def run_rows(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int], sequence: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        """As `run_spans` of one span: logits (vocabulary) of each of its tokens that `outputs` has, `max_outputs` at
        most, valid until the next is asked for. The pass itself is over when this returns.
        """

    def release(self, sequence: int) -> None:
        """Its keys and values are not needed any more."""

    @property
    def can_copy_rows(self) -> bool: ...

    def copy_rows(self, source: int, target: int, num_positions: int) -> None:
        """The first keys and values of one sequence become those of another."""

    def use_adapters(self, weights: Sequence[Weights]) -> None:
        """How much of which adapters the first sequences have in passes to come; the others have none."""

    def can_resume(self, position: int) -> bool:
        """What a token there sees of a sequence's earlier ones is in the KV cache, if it was computed."""

    def embed(self, token_ids: Sequence[int], sequence: int) -> npt.NDArray[np.float32]:
        """The last token's normed hidden state (hidden size) after a prompt, which the sequence then has.

        Raises as `run_spans`.
        """
