"""From prompt ids to answer tokens: chunked prefill, then one pass per token, over one sequence's KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.clock import Clock
from pipo.base.errors import ContextOverflow, UsageError
from pipo.generation.request import FinishReason, SamplingParams
from pipo.generation.sampling import Sampled, Sampler
from pipo.generation.stops import StopMatcher


class ForwardPass(Protocol):
    """Pass tokens at positions start, start + 1, …; logits (outputs, vocabulary) of the asked indices."""

    @property
    def max_tokens(self) -> int: ...

    def run(self, token_ids: Sequence[int], start: int, outputs: Sequence[int] = ()) -> npt.NDArray[np.float32]: ...


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


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


@dataclass(frozen=True, slots=True)
class Piece:
    """What one pass added: a token (None when the last piece only flushes text) and the text that can be shown."""

    token: Sampled | None
    text: str
    finish: FinishReason | None = None


class Generator:
    """Answers one request at a time. The KV cache keeps the tokens of the last one: a prompt that begins with them
    computes only the rest. Threads: one.
    """

    def __init__(self, forward: ForwardPass, vocab_size: int, context_tokens: int, clock: Clock) -> None:
        self._forward = forward
        self._vocab_size = vocab_size
        self._clock = clock
        self._stored: list[int] = []  # the tokens at positions 0, 1, … of the KV cache
        self.context_tokens = context_tokens
        self.timing = Timing(0, 0)

    @property
    def max_chunk(self) -> int:
        return self._forward.max_tokens

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Tokens the answer may have. Raises UsageError, ContextOverflow: nothing is ever cut."""
        if not prompt:
            raise UsageError("the prompt is empty", hint="give some text")
        outside = [t for t in prompt if not 0 <= t < self._vocab_size]
        if outside:
            raise UsageError(f"token id {outside[0]} is outside the vocabulary of {self._vocab_size}")
        room = self.context_tokens - len(prompt)
        wanted = params.max_tokens
        if room < (wanted or 1):
            answer = f"{wanted} tokens of answer" if wanted else "any answer"
            raise ContextOverflow(
                f"a prompt of {len(prompt)} tokens and {answer} do not fit the context of {self.context_tokens}",
                hint=f"-c {len(prompt) + (wanted or 256)} or a shorter prompt",
            )
        return wanted or room

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        end_ids: frozenset[int],
        detokenizer: Detokenizer,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Piece]:
        """Yield pieces until the model ends, a stop string appears or the length is reached.

        `on_prefill(done, total)` is called after each prefill chunk. Raises what `check` and the passes raise.
        """
        max_tokens = self.check(prompt, params)
        sampler, stops = Sampler(params), StopMatcher(params.stop)
        begin = self._clock.now()
        logits = self._prefill(prompt, on_prefill)
        for num_done in range(1, max_tokens + 1):
            sampled = sampler.sample(logits[-1], self._stored)
            self._take_time(num_done, self._clock.now() - begin)
            if sampled.token_id in end_ids and not params.ignore_eos:
                yield Piece(None, stops.feed(detokenizer.flush()) + stops.flush(), FinishReason.STOP)
                return
            text = stops.feed(detokenizer.push(sampled.token_id))
            if stops.hit is not None:
                yield Piece(sampled, text, FinishReason.STOP)
                return
            if num_done == max_tokens:
                text += stops.feed(detokenizer.flush()) + stops.flush()
                yield Piece(sampled, text, FinishReason.STOP if stops.hit is not None else FinishReason.LENGTH)
                return
            yield Piece(sampled, text)
            logits = self._pass([sampled.token_id], outputs=[0])

    def logits(self, token_ids: Sequence[int], chunk: int) -> Iterator[npt.NDArray[np.float32]]:
        """Logits (tokens of the chunk, vocabulary) of every position, computed afresh. For evaluation and tests."""
        self._stored.clear()
        for start in range(0, len(token_ids), chunk):
            part = token_ids[start : start + chunk]
            yield self._pass(part, outputs=range(len(part)))

    def _prefill(self, prompt: Sequence[int], on_prefill: Callable[[int, int], None]) -> npt.NDArray[np.float32]:
        cached = min(_common_prefix(self._stored, prompt), len(prompt) - 1)
        del self._stored[cached:]
        todo, chunk = prompt[cached:], self._forward.max_tokens
        self.timing = Timing(len(todo), cached)
        logits = np.empty((0, 0), np.float32)
        for start in range(0, len(todo), chunk):
            part = todo[start : start + chunk]
            is_last = start + chunk >= len(todo)
            logits = self._pass(part, outputs=[len(part) - 1] if is_last else [])
            on_prefill(start + len(part), len(todo))
        return logits

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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
