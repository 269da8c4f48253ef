"""From prompt ids to answer tokens of one sequence: chunked prefill, then a pass per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.clock import Clock
from pipo.generation.answer import Answer, Constraint, Detokenizer, Piece
from pipo.generation.limits import Limits
from pipo.generation.request import SamplingParams
from pipo.generation.scoring import Scorer
from pipo.generation.slots import common_prefix
from pipo.generation.windows import Windows
from pipo.pipeline.adapters import Weights


class ForwardPass(Protocol):
    """Passes over the KV cache of some sequences; logits are valid until the next one."""

    @property
    def max_tokens(self) -> int: ...

    def run(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int] = (), sequence: int = 0
    ) -> npt.NDArray[np.float32]:
        """Tokens of a sequence at positions start, start + 1, …; logits (outputs, vocabulary) of the asked indices."""

    @property
    def max_outputs(self) -> int: ...

    def run_rows(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """As `run` of the first sequence, logits (vocabulary) one by one."""

    def use_adapters(self, weights: Sequence[Weights]) -> None:
        """How much of which adapters the first sequences have in passes to come; the others have none."""

    def can_resume(self, position: int) -> bool:
        """What a token there sees of the first sequence's earlier ones is in the KV cache, if it was computed."""

    def forget(self) -> None:
        """All keys and values."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one request. `prefill_tokens` were computed, `cached_tokens` were still in the KV cache; `num_decoded` tokens
    followed the first one, within `decode_s` of it: everything a caller waits for is in it.
    """

    prefill_tokens: int
    cached_tokens: int
    ttft_s: float = 0.0
    num_decoded: int = 0
    decode_s: float = 0.0


class Generator:
    """Answers one request at a time. The KV cache keeps the tokens of the last one: a prompt that begins with them
    computes only the rest. Threads: one.
    """

    def __init__(self, forward: ForwardPass, vocab_size: int, context_tokens: int, clock: Clock) -> None:
        self._forward = forward
        self._clock = clock
        self._stored: list[int] = []  # the tokens at positions 0, 1, … of the KV cache
        self._weights: list[Weights] = [{}]  # of adapters: what that was computed with
        self.limits = Limits(vocab_size, context_tokens)
        self.timing = Timing(0, 0)

    @property
    def max_chunk(self) -> int:
        return self._forward.max_tokens

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Tokens the answer may have. Raises UsageError, ContextOverflow: nothing is ever cut."""
        return self.limits.check(prompt, params)

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        end_ids: frozenset[int],
        detokenizer: Detokenizer,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
        constraint: Constraint | None = None,
    ) -> Iterator[Piece]:
        """Yield pieces until the model ends, a stop string appears, the constraint is finished or the length is
        reached.

        `on_prefill(done, total)` is called after each prefill chunk. Raises what `check` and the passes raise.
        """
        answer = Answer(params, self.check(prompt, params), end_ids, detokenizer, constraint)
        begin = self._clock.now()
        logits = self._prefill(prompt, on_prefill)
        while True:
            piece = answer.take(logits[-1], self._stored)
            self._take_time(answer.num_passes, self._clock.now() - begin)
            yield piece
            if piece.token is None or piece.finish is not None:
                return
            logits = self._pass([piece.token.token_id], outputs=[0])

    def use_adapters(self, weights: Sequence[Weights]) -> None:
        """How much of which adapters the sequences of the next request have. Others forget the KV cache."""
        if list(weights) != self._weights:
            self.forget()
        self._weights = list(weights)
        self._forward.use_adapters(weights)

    def forget(self) -> None:
        """What is in the KV cache."""
        self._stored.clear()
        self._forward.forget()

    def logits(self, token_ids: Sequence[int], chunk: int) -> Iterator[npt.NDArray[np.float32]]:
        """Logits (tokens of the chunk, vocabulary) of every position, computed afresh. For evaluation and tests."""
        self._stored.clear()
        for start in range(0, len(token_ids), chunk):
            part = token_ids[start : start + chunk]
            yield self._pass(part, outputs=range(len(part)))

    def score(self, windows: Windows, scorer: Scorer) -> Iterator[int]:
        """Show `scorer` the logits of each scored position. Yields the tokens of every pass, once it has seen them.

        Raises UsageError for a token that the model does not have, and what the passes raise.
        """
        self.limits.check_vocabulary(windows.token_ids)
        self._stored.clear()
        for window in range(windows.num_windows):
            ids = windows.inputs(window)
            for part in windows.passes(self._forward.max_tokens, self._forward.max_outputs):
                outputs = [position - part.start for position in part.outputs]
                rows = self._forward.run_rows(ids[part.start : part.stop], part.start, outputs)
                for position, logits in zip(part.outputs, rows, strict=True):
                    scorer.take(windows.next_token(window, position), logits)
                yield part.num_tokens

    def _prefill(self, prompt: Sequence[int], on_prefill: Callable[[int, int], None]) -> npt.NDArray[np.float32]:
        cached = min(common_prefix(self._stored, list(prompt)), len(prompt) - 1)
        cached = cached if self._forward.can_resume(cached) else 0
        del self._stored[cached:]
        todo, logits = prompt[cached:], np.empty((0, 0), np.float32)
        self.timing = Timing(len(todo), cached)
        for part, found in self._read(todo, cached):
            self._stored.extend(part)
            logits = found
            on_prefill(len(self._stored) - cached, len(todo))
        return logits

    def _read(self, tokens: Sequence[int], start: int) -> Iterator[tuple[Sequence[int], npt.NDArray[np.float32]]]:
        """Chunk by chunk, at positions from `start` on; with each its logits, of which only the last one's last token
        has any: (1, vocabulary).
        """
        chunk = self._forward.max_tokens
        for done in range(0, len(tokens), chunk):
            part = tokens[done : done + chunk]
            outputs = [len(part) - 1] if done + chunk >= len(tokens) else []
            yield part, self._forward.run(part, start + done, outputs)

    def _take_time(self, num_done: int, seconds: float) -> None:
        """A token was chosen, the `num_done`th, `seconds` after the request."""
        if num_done == 1:
            self.timing = replace(self.timing, ttft_s=seconds)
        else:
            self.timing = replace(self.timing, num_decoded=num_done - 1, decode_s=seconds - self.timing.ttft_s)

    def _pass(self, tokens: Sequence[int], outputs: Sequence[int]) -> npt.NDArray[np.float32]:
        logits = self._forward.run(tokens, len(self._stored), outputs)
        self._stored.extend(tokens)
        return logits
