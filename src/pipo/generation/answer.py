"""One answer as it grows: a token from each pass's logits, the text that can be shown, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.generation.request import Completion, FinishReason, SamplingParams, Usage
from pipo.generation.sampling import Sampled, Sampler
from pipo.generation.stops import StopMatcher


class Constraint(Protocol):
    """What `generation.constraints.Constraint` is to an answer."""

    @property
    def is_finished(self) -> bool: ...

    def apply(self, logits: npt.NDArray[np.float32], *, goes_on: bool = False) -> npt.NDArray[np.float32]: ...

    def take(self, token_id: int) -> None: ...


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one pass added: a token (None when the last piece only flushes text) and the text that can be shown.

    `stop` is the stop string that ended the answer, where one did. `scored` are the prompt's next tokens, where their
    log-probabilities were asked for: they come before the answer.
    """

    token: Sampled | None
    text: str
    finish: FinishReason | None = None
    stop: str | None = None
    scored: tuple[Sampled, ...] = ()


class Answer:
    """Ends when the model does, at a stop string, once a constraint is finished, or after `max_tokens`: the piece that
    says so is the last one.

    With `ignore_eos` a constrained answer goes on as long as the constraint allows it.
    """

    def __init__(
        self,
        params: SamplingParams,
        max_tokens: int,
        end_ids: frozenset[int],
        detokenizer: Detokenizer,
        constraint: Constraint | None = None,
    ) -> None:
        self.num_passes = 0  # whose logits it has taken
        self._params = params
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._detokenizer = detokenizer
        self._sampler = Sampler(params)
        self._stops = StopMatcher(params.stop)
        self._constraint = constraint

    @property
    def is_constrained(self) -> bool:
        return self._constraint is not None

    def take(self, logits: npt.NDArray[np.float32], history: Sequence[int]) -> Piece:
        """Choose from logits (vocabulary). `history` is prompt and answer so far. Raises ComputeError, and UsageError
        where a constraint has become too much to follow, or leaves nothing to choose.
        """
        sampled = self._sampler.sample(logits, history, self._constrain if self._constraint is not None else None)
        self.num_passes += 1
        if sampled.token_id in self._end_ids and (not self._params.ignore_eos or self._constraint is not None):
            text = self._rest()  # which may complete a stop string
            return Piece(None, text, FinishReason.STOP, self._stops.hit)
        if self._constraint is not None:
            self._constraint.take(sampled.token_id)
        return self._piece(sampled)

    def _piece(self, sampled: Sampled) -> Piece:
        text = self._stops.feed(self._detokenizer.push(sampled.token_id))
        if self._stops.hit is not None:
            return Piece(sampled, text, FinishReason.STOP, self._stops.hit)
        is_whole = self._constraint is not None and self._constraint.is_finished
        if is_whole or self.num_passes == self._max_tokens:
            text += self._rest()
            ends_itself = is_whole or self._stops.hit is not None
            finish = FinishReason.STOP if ends_itself else FinishReason.LENGTH
            return Piece(sampled, text, finish, self._stops.hit)
        return Piece(sampled, text)

    def _constrain(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        assert self._constraint is not None
        return self._constraint.apply(logits, goes_on=self._params.ignore_eos)

    def _rest(self) -> str:
        """What was held back for a whole character, and for a stop string that did not come."""
        return self._stops.feed(self._detokenizer.flush()) + self._stops.flush()


def completion_of(prompt: Sequence[int], pieces: Sequence[Piece], cached_tokens: int = 0) -> Completion:
    """The whole of an answer that came in pieces."""
    tokens = tuple(piece.token for piece in pieces if piece.token is not None)
    finish = pieces[-1].finish or FinishReason.CANCELLED
    usage = Usage(len(prompt), len(tokens), cached_tokens)
    return Completion("".join(piece.text for piece in pieces), tokens, finish, usage)
