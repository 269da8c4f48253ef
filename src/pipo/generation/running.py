"""A request that has a slot: how far it is, and its times."""

from __future__ import annotations

from dataclasses import dataclass

from pipo.generation.answer import Answer, Piece
from pipo.generation.events import RequestId
from pipo.generation.request import Summary, Usage
from pipo.generation.slots import Slot, common_prefix
from pipo.pipeline.spans import Span


@dataclass(frozen=True, slots=True)
class Shared:
    """What is to be copied from another slot, once its request has computed it."""

    source: Slot
    owner: RequestId | None
    num_tokens: int

    @property
    def is_sure_to_come(self) -> bool:
        """The request that computes it is still there."""
        return self.owner is not None and self.source.owner == self.owner

    def num_common(self, slot: Slot) -> int:
        """What of it the source has."""
        if self.source.weights != slot.weights:
            return 0
        stored = self.source.tokens[: min(self.source.num_stored, self.num_tokens)]
        return common_prefix(stored, slot.tokens[: self.num_tokens])


@dataclass(slots=True, eq=False)
class Running:
    """`answer` is None where an embedding of the prompt is wanted. Times are those of the batcher's clock. `num_top` is
    how many alternatives are to be listed with each token of the prompt; None: the prompt is not scored.
    """

    request_id: RequestId
    slot: Slot
    answer: Answer | None
    since_s: float  # it was submitted
    begun_s: float  # it got the slot
    prompt_tokens: int
    cached_tokens: int = 0
    num_top: int | None = None
    shared: Shared | None = None  # until that is copied, it waits
    completion_tokens: int = 0
    first_s: float | None = None  # its first token was there
    last_s: float = 0.0

    @property
    def is_decoding(self) -> bool:
        return self.first_s is not None

    @property
    def is_scoring(self) -> bool:
        """What comes after some of the prompt's tokens is known, and how likely it was is not."""
        return self.num_top is not None and self.slot.num_stored < self.prompt_tokens - 1

    @property
    def num_to_compute(self) -> int:
        return len(self.slot.tokens) - self.slot.num_stored

    def span(self, num_tokens: int) -> Span:
        """The next tokens that are to be computed; the last one of all wants logits."""
        slot, end = self.slot, self.slot.num_stored + num_tokens
        return Span(slot.sequence, slot.num_stored, slot.tokens[slot.num_stored : end], end == len(slot.tokens))

    def take(self, piece: Piece, now_s: float) -> bool:
        """What a pass added; whether more is to come."""
        self.last_s = now_s
        self.first_s = now_s if self.first_s is None else self.first_s
        self.completion_tokens += piece.token is not None
        if piece.token is None or piece.finish is not None:
            return False
        self.slot.tokens.append(piece.token.token_id)
        return True

    @property
    def summary(self) -> Summary:
        first_s = self.last_s if self.first_s is None else self.first_s
        usage = Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
        return Summary(usage, self.begun_s - self.since_s, first_s - self.since_s, self.last_s - first_s)
