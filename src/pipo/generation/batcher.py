"""Continuous batching: sequences join and leave between passes, all of which share one sweep of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pipo.base.clock import Clock
from pipo.base.errors import Cancelled, PipoError, UsageError
from pipo.generation.answer import Answer, Constraint, Detokenizer, Piece
from pipo.generation.constraints import MOST_AT_A_TIME
from pipo.generation.events import Embedding, Event, RequestId
from pipo.generation.limits import Limits
from pipo.generation.passes import SpanPasses
from pipo.generation.prefill_shares import shares
from pipo.generation.request import ConstraintSpec, GenerationRequest, Sampled, Summary
from pipo.generation.running import Running, Shared
from pipo.generation.sampling import scored
from pipo.generation.slots import Slots
from pipo.generation.waiting import QueueSize, Waiting, WaitingLine, compact
from pipo.pipeline.adapters import Weights
from pipo.pipeline.spans import Span

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


class Interrupt(Protocol):
    """Ends the pass that runs, which then raises Cancelled. Threads: any."""

    def set(self) -> None: ...

    def clear(self) -> None:
        """Raises Cancelled where not a pass but everything is to end."""


class Tokens(Protocol):
    """What answers need of a tokenizer."""

    @property
    def end_ids(self) -> frozenset[int]: ...

    def detokenizer(
        self, after: Sequence[int], shown: frozenset[int] = frozenset(), *, keeps_space: bool = False
    ) -> Detokenizer: ...


def no_constraints(spec: ConstraintSpec) -> Constraint:
    """Raises UsageError."""
    raise UsageError(f"answers cannot be constrained by a {spec.kind.value} here")


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """`prefill_tokens` of prompts at most share a pass with rows that decode; None: as many as fit."""

    limits: Limits
    queue: QueueSize
    prefill_tokens: int | None = None
    make_constraint: Callable[[ConstraintSpec], Constraint] = no_constraints
    most_constrained: int = MOST_AT_A_TIME


@dataclass(slots=True)
class Counters:
    """Tokens since the start. Those of prompts count as they are read, or found to be there already."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Batcher:
    """Answers requests, `step` by `step`: each is one pass with a token of every sequence that decodes and parts of the
    prompts of those that do not yet. Prompts that are scored have passes of their own. A request's failure ends it
    alone; that of a pass ends all that have a slot.

    Threads: one, but `cancel` from any.
    """

    def __init__(
        self, passes: SpanPasses, tokens: Tokens, settings: BatchSettings, interrupt: Interrupt, clock: Clock
    ) -> None:
        self.counters = Counters()
        self._settings = settings
        self._passes = passes
        self._tokens = tokens
        self._interrupt = interrupt
        self._clock = clock
        self._line = WaitingLine(settings.queue)
        self._slots = Slots(passes.num_sequences)
        self._running: dict[RequestId, Running] = {}  # in order of arrival
        self._events: list[Event] = []
        self._weights: list[Weights] | None = None  # that the passes use
        self._cancelled: set[RequestId] = set()  # not yet dropped
        self._in_pass: frozenset[RequestId] = frozenset()
        self._num_interrupts = self._num_handled = 0

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_unread(self) -> int:
        """Tokens of prompts that have a slot and no keys and values yet. Threads: any."""
        return sum(slot.num_unread for slot in self._slots.all)

    @property
    def is_idle(self) -> bool:
        return not self._running and not self.num_waiting

    @property
    def has_free_slot(self) -> bool:
        """For one more than there are."""
        return self.num_running + self.num_waiting < len(self._slots.all)

    def submit(self, request_id: RequestId, request: GenerationRequest, weights: Weights) -> None:
        """Raises UsageError, ContextOverflow and EngineBusy; then nothing more is heard of it."""
        max_tokens = self._settings.limits.check(request.prompt, request.params)
        prompt = compact(request.prompt)
        request = replace(request, prompt=prompt)  # a list takes nine times as much
        self._line.put(Waiting(request_id, prompt, max_tokens, weights, self._clock.now(), request))

    def submit_embedding(self, request_id: RequestId, prompt: Sequence[int], weights: Weights) -> None:
        """As `submit`; an Embedding ends it."""
        self._settings.limits.check_prompt(prompt)
        self._line.put(Waiting(request_id, compact(prompt), 0, weights, self._clock.now()))

    def cancel(self, request_id: RequestId) -> None:
        """Its slot is free before the next pass. The pass that runs goes on for others, and ends within a stage where
        there are none.
        """
        self._cancelled.add(request_id)
        in_pass = self._in_pass
        if in_pass and in_pass <= self._cancelled:
            self._num_interrupts += 1
            self._interrupt.set()

    def step(self) -> list[Event]:
        """One pass, and one more each where an embedding is wanted and where a prompt is scored. Raises Cancelled where
        everything was to end.
        """
        self._drop_cancelled()
        while self.num_running < len(self._slots.all) and (waiting := self._line.take_first(self._may_begin)):
            self._admit(waiting)
        for running in self._running.values():
            self._copy_when_ready(running)
        wanting = next((each for each in self._running.values() if each.answer is None), None)
        if wanting is not None:
            self._embed(wanting)
        scoring = next((each for each in self._running.values() if each.is_scoring), None)
        if scoring is not None:
            self._score(scoring)
        spans = self._spans()
        if spans:
            self._pass(spans)
        return self._take_events()

    def forget(self) -> None:
        """What is kept of requests that have ended: somebody else computes with the same KV cache."""
        for slot in self._slots.free:
            self._passes.release(slot.sequence)
        self._slots.forget()
        self._weights = None

    def drop_all(self, error: PipoError) -> list[Event]:
        """End every request with it."""
        while waiting := self._line.take_first():
            self._events.append((waiting.request_id, error))
        self._end_running(error)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        cancelled, error = set(self._cancelled), Cancelled("the request was cancelled")
        self._events += [(waiting.request_id, error) for waiting in self._line.take_out(cancelled)]
        for request_id in cancelled & self._running.keys():
            self._end(self._running[request_id], error)
        self._cancelled -= cancelled

    def _may_begin(self, waiting: Waiting) -> bool:
        """There is memory for so many constraints."""
        if waiting.request is None or waiting.request.constraint is None:
            return True
        held = sum(each.answer is not None and each.answer.is_constrained for each in self._running.values())
        return held < self._settings.most_constrained

    def _admit(self, waiting: Waiting) -> None:
        """While a slot is free. A constraint that cannot be had ends the request."""
        prompt = list(waiting.prompt)
        try:
            answer = self._answer_to(waiting, prompt)
        except PipoError as error:
            self._events.append((waiting.request_id, error))
            return
        running = self._seated(waiting, prompt, answer)
        self._running[waiting.request_id] = running
        self._copy_when_ready(running)  # at once where it can be: somebody else may take the source
        if running.num_top is not None:
            self._say_scored(running, [Sampled(prompt[0])])  # comes after nothing

    def _answer_to(self, waiting: Waiting, prompt: Sequence[int]) -> Answer | None:
        request = waiting.request
        if request is None:
            return None
        constraint = self._settings.make_constraint(request.constraint) if request.constraint else None
        detokenizer = self._tokens.detokenizer(prompt, request.shown, keeps_space=constraint is not None)
        return Answer(request.params, waiting.max_tokens, self._tokens.end_ids, detokenizer, constraint)

    def _seated(self, waiting: Waiting, prompt: Sequence[int], answer: Answer | None) -> Running:
        passes, slots = self._passes, self._slots
        num_top = waiting.request.params.logprobs if waiting.request and waiting.request.scores_prompt else None
        is_afresh = answer is None or num_top is not None  # computed from the first token on
        known = [] if is_afresh else prompt
        seat = slots.find_seat(known, waiting.weights, passes.can_resume, can_copy=passes.can_copy_rows)
        num_kept = seat.num_shared if seat.source is None else 0
        if not num_kept:
            passes.release(seat.slot.sequence)
        shared = Shared(seat.source, seat.source.owner, seat.num_shared) if seat.source else None
        slots.take(seat.slot, waiting.request_id, prompt, waiting.weights, num_kept)
        since_s, now_s = waiting.since_s, self._clock.now()
        return Running(
            waiting.request_id, seat.slot, answer, since_s, now_s, len(prompt), num_kept, num_top, shared=shared
        )

    def _copy_when_ready(self, running: Running) -> None:
        """Once the source has what is shared, or will not have it any more: then what it has of it."""
        shared, slot = running.shared, running.slot
        if shared is None or (shared.is_sure_to_come and shared.source.num_stored < shared.num_tokens):
            return
        num_common = shared.num_common(slot)
        num_common = num_common if self._passes.can_resume(num_common) else 0
        running.shared, running.cached_tokens, slot.num_stored = None, num_common, num_common
        if num_common:
            self._passes.copy_rows(shared.source.sequence, slot.sequence, num_common)

    def _spans(self) -> list[Span]:
        running = (each for each in self._running.values() if each.shared is None and each.answer is not None)
        ready = [each for each in running if not each.is_scoring]
        decoding = [running for running in ready if running.is_decoding]
        reading = [running for running in ready if not running.is_decoding]
        room = self._passes.max_tokens - len(decoding)
        if decoding and self._settings.prefill_tokens is not None:
            room = max(min(room, self._settings.prefill_tokens), 1)
        parts = shares([running.num_to_compute for running in reading], room)
        chunks = [running.span(part) for running, part in zip(reading, parts, strict=True) if part]
        return [running.span(1) for running in decoding] + chunks

    def _pass(self, spans: Sequence[Span]) -> None:
        owners = [self._slots.all[span.sequence].owner for span in spans]
        ours = [self._running[owner] for owner in owners if owner is not None]
        logits = self._computed(ours, lambda: self._passes.run_spans(spans))
        if logits is None:
            return
        rows = iter(logits)
        for running, span in zip(ours, spans, strict=True):
            running.slot.num_stored += len(span.token_ids)
            if not running.is_decoding:
                self.counters.prompt_tokens += len(span.token_ids)
            if span.wants_logits:
                self._choose(running, next(rows))

    def _embed(self, running: Running) -> None:
        slot = running.slot
        vector = self._computed([running], lambda: self._passes.embed(slot.tokens, slot.sequence))
        if vector is not None:
            self.counters.prompt_tokens += len(slot.tokens)
            wide = vector.astype(np.float64)
            self._end(running, Embedding((wide / np.linalg.norm(wide)).tolist()))

    def _score(self, running: Running) -> None:
        """A pass over the next tokens of its prompt: how likely those were that came after them."""
        slot, num_top = running.slot, running.num_top
        assert num_top is not None
        start, most = slot.num_stored, min(self._passes.max_tokens, self._passes.max_outputs)
        part = slot.tokens[start : min(start + most, running.prompt_tokens - 1)]
        rows = self._computed([running], lambda: self._passes.run_rows(part, start, range(len(part)), slot.sequence))
        if rows is None:
            return
        slot.num_stored += len(part)
        self.counters.prompt_tokens += len(part)
        nexts = slot.tokens[start + 1 : start + 1 + len(part)]
        try:
            found = [scored(logits, token_id, num_top) for logits, token_id in zip(rows, nexts, strict=True)]
        except PipoError as error:
            self._end(running, error)
        else:
            self._say_scored(running, found)

    def _say_scored(self, running: Running, tokens: Sequence[Sampled]) -> None:
        self._events.append((running.request_id, Piece(None, "", scored=tuple(tokens))))

    def _computed(self, ours: Sequence[Running], compute: Callable[[], T]) -> T | None:
        """None where it was ended: by a cancellation, in which case whoever is left goes on, or by a failure, which
        ends all that have a slot.
        """
        try:
            self._use_adapters()
            self._in_pass = frozenset(running.request_id for running in ours)
            if self._in_pass <= self._cancelled:
                return None  # they were cancelled before there was a pass to interrupt
            return compute()
        except Cancelled as error:
            self._take_interrupt(error)
        except PipoError as error:
            self._end_running(error)
        finally:
            self._in_pass = frozenset()
        return None

    def _take_interrupt(self, error: Cancelled) -> None:
        """Raises the error where it was none of ours. One of ours may come late, and end a pass of others: that pass is
        made again.
        """
        if self._num_handled == self._num_interrupts:
            raise error
        self._num_handled = self._num_interrupts
        self._interrupt.clear()

    def _use_adapters(self) -> None:
        weights = [slot.weights for slot in self._slots.all]
        if weights != self._weights:
            self._passes.use_adapters(weights)
            self._weights = weights

    def _choose(self, running: Running, logits: Floats) -> None:
        assert running.answer is not None
        if not running.is_decoding:
            self.counters.prompt_tokens += running.cached_tokens
            self.counters.cached_tokens += running.cached_tokens
        try:
            piece = running.answer.take(logits, running.slot.tokens)
        except PipoError as error:
            self._end(running, error)
            return
        self._events.append((running.request_id, piece))
        self.counters.completion_tokens += piece.token is not None
        if not running.take(piece, self._clock.now()):
            self._end(running, running.summary)

    def _end_running(self, error: PipoError) -> None:
        for running in list(self._running.values()):
            self._end(running, error)

    def _end(self, running: Running, how: Summary | Embedding | PipoError) -> None:
        del self._running[running.request_id]
        self._slots.give_back(running.slot)
        self._events.append((running.request_id, how))
