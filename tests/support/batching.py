"""A batcher over arithmetic, its requests and what it says of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pipo.base.clock import VirtualClock
from pipo.base.errors import Cancelled, PipoError
from pipo.generation.answer import Piece
from pipo.generation.batcher import Batcher, BatchSettings
from pipo.generation.events import Embedding, Event, RequestId
from pipo.generation.limits import Limits
from pipo.generation.request import GenerationRequest, SamplingParams, Summary
from pipo.generation.waiting import QueueSize
from tests.support.arithmetic_passes import END, VOCAB, ArithmeticPasses

CONTEXT = 64
PLENTY_OF_ROOM = QueueSize(num_requests=1000, prompt_tokens=100_000)


class Letters:
    """Token ids as text: one letter each."""

    end_ids = frozenset({END})

    class _Detokenizer:
        def push(self, token_id: int) -> str:
            return chr(64 + token_id)

        def flush(self) -> str:
            return ""

    def detokenizer(
        self, after: Sequence[int], shown: frozenset[int] = frozenset(), *, keeps_space: bool = False
    ) -> Letters._Detokenizer:
        return Letters._Detokenizer()


class Flag:
    """What ends a pass; `for_all` says that everything is to end."""

    def __init__(self) -> None:
        self.is_set = False
        self.for_all = False

    def set(self) -> None:
        self.is_set = True

    def clear(self) -> None:
        self.is_set = False
        if self.for_all:
            raise Cancelled("everything")


class Bench:
    """Collects what a batcher says, by request."""

    def __init__(self, passes: ArithmeticPasses, **settings: Any) -> None:
        self.passes, self.flag, self.clock = passes, Flag(), VirtualClock()
        limits = Limits(VOCAB, CONTEXT)
        self.batcher = Batcher(
            passes, Letters(), BatchSettings(limits, **{"queue": PLENTY_OF_ROOM, **settings}), self.flag, self.clock
        )
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        self.ends: dict[int, Summary | Embedding | PipoError] = {}

    def submit(
        self,
        number: int,
        prompt: Sequence[int],
        weights: Mapping[Any, float] | None = None,
        *,
        scores_prompt: bool = False,
        **params: Any,
    ) -> None:
        settings = SamplingParams(**{"temperature": 0, "max_tokens": 6, **params})
        request = GenerationRequest(prompt, settings, scores_prompt=scores_prompt)
        self.batcher.submit(RequestId(number), request, dict(weights or {}))

    def step(self) -> None:
        self.take(self.batcher.step())

    def take(self, events: Sequence[Event]) -> None:
        for number, what in events:
            assert number not in self.ends, "nothing is said after the end"
            if isinstance(what, Piece):
                self.pieces[number].append(what)
            else:
                self.ends[number] = what

    def run(self) -> None:
        """Until all have been answered."""
        for _ in range(10_000):
            if self.batcher.is_idle:
                return
            self.step()
        raise AssertionError("it never ends")

    def tokens(self, number: int) -> list[int]:
        return [piece.token.token_id for piece in self.pieces[number] if piece.token is not None]

    def summary(self, number: int) -> Summary:
        found = self.ends[number]
        assert isinstance(found, Summary), found
        return found
