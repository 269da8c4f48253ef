"""Passes of one sequence, one after another, where passes that mix sequences are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipo.base.errors import UsageError
from pipo.pipeline.adapters import Weights
from pipo.pipeline.forward import Forward
from pipo.pipeline.spans import Span


class ForwardSpans:
    """Threads: one at a time."""

    can_copy_rows = False

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    @property
    def max_tokens(self) -> int:
        return self._forward.max_tokens

    @property
    def max_outputs(self) -> int:
        return self._forward.max_outputs

    @property
    def num_sequences(self) -> int:
        return self._forward.num_sequences

    def run_spans(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        rows = []
        for span in spans:
            outputs = [len(span.token_ids) - 1] if span.wants_logits else []
            logits = self._forward.run(span.token_ids, span.start, outputs, span.sequence)
            rows += [logits[0].copy()] if span.wants_logits else []
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def release(self, sequence: int) -> None:
        pass

    def copy_rows(self, source: int, target: int, num_positions: int) -> None:
        raise AssertionError("rows cannot be copied")

    def use_adapters(self, weights: Sequence[Weights]) -> None:
        self._forward.use_adapters(weights)

    def can_resume(self, position: int) -> bool:
        return self._forward.can_resume(position)

    def embed(self, token_ids: Sequence[int], sequence: int) -> npt.NDArray[np.float32]:
        raise UsageError("there are no embeddings yet")
