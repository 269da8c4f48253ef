"""The sequences that have keys and values at a time, and what is still in them of requests that have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipo.generation.events import RequestId
from pipo.pipeline.adapters import Weights

LEAST_COPY_TOKENS = 16  # fewer are computed again sooner than another sequence is waited for
END_TOKENS = 8  # of a prompt: what a template writes otherwise once the answer is there, as where thoughts begin
_COMPARED_AT_ONCE = 256


@dataclass(slots=True, eq=False)
class Slot:
    """`tokens` are those of its request, prompt and answer, of which the first `num_stored` have keys and values.
    Without an owner all have, and stay until somebody needs the slot.
    """

    sequence: int
    tokens: list[int] = field(default_factory=list)
    num_stored: int = 0
    num_prompt: int = 0  # of the tokens
    weights: Weights = field(default_factory=dict)  # of adapters: what that was computed with
    owner: RequestId | None = None
    last_used: int = 0  # later is more; 0: never

    def goes_on_with(self, num_shared: int) -> bool:
        """Whether a prompt that has so many tokens in common with it may be the next of the same conversation, or the
        same again: of the last answer it may have nothing.
        """
        return num_shared >= min(self.num_prompt - END_TOKENS, len(self.tokens))

    @property
    def num_unread(self) -> int:
        """Of the prompt: an answer has one token at most that is not computed."""
        num = len(self.tokens) - self.num_stored
        return num if num > 1 and self.owner is not None else 0


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a request goes: a slot, and how much of the prompt is in it, or will be in `source`, from which it is
    copied.
    """

    slot: Slot
    num_shared: int = 0
    source: Slot | None = None


class Slots:
    """Threads: one."""

    def __init__(self, num_sequences: int) -> None:
        self.all = [Slot(i) for i in range(num_sequences)]
        self._now = 0

    @property
    def free(self) -> list[Slot]:
        """The one that was used longest ago first."""
        return sorted((slot for slot in self.all if slot.owner is None), key=lambda slot: slot.last_used)

    def find_seat(
        self, prompt: Sequence[int], weights: Weights, can_resume: Callable[[int], bool], *, can_copy: bool
    ) -> Seat:
        """For a request, while a slot is free. The longest beginning of its prompt that is in a slot with the same
        adapters serves it: in place where nobody owns the slot and the request goes on from the last one there, or
        where rows cannot be copied; else as a copy in the slot that was used longest ago, so that conversations that
        begin alike keep what is theirs. The last token of a prompt is always computed.
        """
        free = self.free
        owned = [slot for slot in self.all if slot.owner is not None] if can_copy else []
        lengths = {}
        for slot in [*free, *owned]:
            shared = max(min(common_prefix(slot.tokens, prompt), len(prompt) - 1), 0)
            shared = shared if slot.weights == weights else 0
            lengths[slot.sequence] = shared if can_resume(shared) else 0
        best = max([*free, *owned], key=lambda slot: lengths[slot.sequence])  # the first of equals
        shared = lengths[best.sequence]
        is_long = shared >= LEAST_COPY_TOKENS
        if can_copy and is_long and best is not free[0] and (best.owner is not None or not best.goes_on_with(shared)):
            return Seat(free[0], shared, best)
        if best.owner is None and (not can_copy or is_long or 2 * shared >= len(best.tokens)):
            return Seat(best, shared)
        return Seat(free[0], lengths[free[0].sequence])

    def take(self, slot: Slot, owner: RequestId, prompt: Sequence[int], weights: Weights, num_kept: int) -> None:
        """For a request, which goes on from the first `num_kept` tokens."""
        assert slot.owner is None
        slot.owner, slot.weights = owner, weights
        slot.tokens, slot.num_stored, slot.num_prompt = list(prompt), num_kept, len(prompt)
        self._touch(slot)

    def give_back(self, slot: Slot) -> None:
        """What was computed stays."""
        slot.owner = None
        del slot.tokens[slot.num_stored :]
        self._touch(slot)

    def forget(self) -> None:
        """What nobody owns."""
        for slot in self.free:
            slot.tokens, slot.num_stored, slot.last_used = [], 0, 0

    def _touch(self, slot: Slot) -> None:
        self._now += 1
        slot.last_used = self._now


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens with which both begin."""
    most, start = min(len(a), len(b)), 0
    while start < most and a[start : start + _COMPARED_AT_ONCE] == b[start : start + _COMPARED_AT_ONCE]:
        start += _COMPARED_AT_ONCE
    for i in range(start, most):
        if a[i] != b[i]:
            return i
    return most
