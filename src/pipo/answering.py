"""Requests as the compute thread runs them, and what they cost."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from pipo.base.clock import Clock
from pipo.base.errors import UsageError
from pipo.generation.adapters import Loaded, weights_of
from pipo.generation.answer import Piece
from pipo.generation.batcher import Batcher, BatchSettings, Interrupt
from pipo.generation.constraints import Constraint, Grammars
from pipo.generation.events import Event
from pipo.generation.inbox import Inbox
from pipo.generation.loop import Generator, Timing
from pipo.generation.request import ConstraintSpec, SamplingParams, Summary
from pipo.generation.request_loop import RequestLoop
from pipo.generation.scoring import Scorer
from pipo.generation.waiting import DEFAULT_QUEUE
from pipo.generation.windows import Windows
from pipo.hardware.memory import PeakSampler
from pipo.model_file import ModelFile
from pipo.pipeline.adapters import Weights
from pipo.pipeline.forward import Forward
from pipo.pipeline.stats import PassStats
from pipo.plan import Plan
from pipo.text.contract import ModelTokenizer

TOKENS_PER_SAMPLE = 16  # of the memory in use: between two passes, with caches cold, a sample takes 0.1 ms

Batches = abc.Generator[list[Event], None, None]  # what was said of several requests, pass by pass


@dataclass(frozen=True, slots=True)
class Report:
    """What the last request, or all that were answered together, cost. `prefill` and `decode` count their own passes;
    of several requests, those up to the first token of any, and those after it.
    """

    timing: Timing
    prefill: PassStats
    decode: PassStats
    num_generated: int
    peak_anonymous_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of decode, as the caller sees it: tokens after the first. 0 when there were none."""
        return self.timing.num_decoded / self.timing.decode_s if self.timing.decode_s else 0.0


@dataclass(slots=True)
class _BatchAccount:
    """Of requests that are answered together, since `begin_s`."""

    begin_s: float
    prefill: PassStats = field(default_factory=PassStats)
    decode: PassStats = field(default_factory=PassStats)
    num_generated: int = 0
    computed_tokens: int = 0  # of the prompts of those that have ended
    cached_tokens: int = 0
    ttft_s: float | None = None
    total_s: float = 0.0

    def take(self, events: Sequence[Event], stats: PassStats, now_s: float) -> None:
        """What a pass gave and cost."""
        (self.prefill if self.ttft_s is None else self.decode).add(stats)
        for _, what in events:
            if isinstance(what, Piece) and what.token is not None:
                self.num_generated += 1
                self.total_s = now_s - self.begin_s
                self.ttft_s = self.total_s if self.ttft_s is None else self.ttft_s
            elif isinstance(what, Summary):
                self.cached_tokens += what.usage.cached_tokens
                self.computed_tokens += what.usage.prompt_tokens - what.usage.cached_tokens

    def report(self, peak_bytes: int) -> Report:
        ttft_s = self.ttft_s or 0.0
        num_decoded = max(self.num_generated - 1, 0)
        timing = Timing(self.computed_tokens, self.cached_tokens, ttft_s, num_decoded, self.total_s - ttft_s)
        return Report(timing, self.prefill, self.decode, self.num_generated, peak_bytes)


class Answering:
    """`report` is that of the last request, or of all that were answered together last; `totals` counts the passes of
    the latter. One after another they are the generator's, together the batcher's: what one of these two has in the KV
    cache is nothing to the other.

    Threads: the one that computes.
    """

    def __init__(
        self,
        generator: Generator,
        batcher: Batcher,
        loop: RequestLoop,
        forward: Forward,
        tokenizer: ModelTokenizer,
        peak: PeakSampler,
        clock: Clock,
        grammars: Grammars | None = None,
    ) -> None:
        self.report: Report | None = None
        self.totals = PassStats()
        self.generator = generator
        self.batcher = batcher
        self._loop = loop
        self._forward = forward
        self._tokenizer = tokenizer
        self._peak = peak
        self._clock = clock
        self._is_batchers = False  # the KV cache
        self._grammars = grammars

    def constraint(self, spec: ConstraintSpec) -> Constraint:
        """For one answer. Raises UsageError where it cannot be followed, or no memory is kept for any. Threads: any."""
        return constraint_of(spec, self._grammars)

    def use_generator(self, weights: Weights) -> Generator:
        """For a sequence with these adapters."""
        if self._is_batchers:
            self.forget()
        self._is_batchers = False
        self.generator.use_adapters([weights])
        return self.generator

    def forget(self) -> None:
        """What is in the KV cache."""
        self.batcher.forget()
        self.generator.forget()

    def answer(
        self,
        prompt: list[int],
        params: SamplingParams,
        weights: Weights,
        on_prefill: Callable[[int, int], None],
        constraint: Constraint | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> Iterator[Piece]:
        generator, ends = self.use_generator(weights), self._tokenizer.end_ids
        detokenizer = self._tokenizer.detokenizer(prompt, shown, keeps_space=constraint is not None)

        def note_chunk(done: int, total: int) -> None:
            self._peak.sample()
            on_prefill(done, total)

        pieces = generator.generate(prompt, params, ends, detokenizer, note_chunk, constraint)
        with closing(self._accounted(pieces)) as accounted:
            yield from accounted

    def answer_requests(self, inbox: Inbox) -> Batches:
        """Until all that come have been answered. Raises Cancelled."""
        if not self._is_batchers:
            self.forget()
        self._is_batchers = True
        self._forward.take_stats()
        account = _BatchAccount(self._clock.now())
        try:
            for events in self._loop.run(inbox):
                stats = self._forward.take_stats()
                before = account.num_generated // TOKENS_PER_SAMPLE
                account.take(events, stats, self._clock.now())
                self.totals.add(stats)
                if account.num_generated // TOKENS_PER_SAMPLE > before:
                    self._peak.sample()
                yield events
        finally:
            self._peak.sample()
            self.report = account.report(self._peak.peak_bytes)

    def score(self, windows: Windows, scorer: Scorer, weights: Weights) -> Iterator[int]:
        """Tokens of each pass."""
        generator = self.use_generator(weights)
        self._forward.take_stats()
        num_done = 0
        try:
            for num_tokens in generator.score(windows, scorer):
                self._peak.sample()
                num_done += num_tokens
                yield num_tokens
        finally:
            self.report = Report(Timing(num_done, 0), self._forward.take_stats(), PassStats(), 0, self._peak.peak_bytes)

    def _accounted(self, pieces: Iterator[Piece]) -> abc.Generator[Piece, None, None]:
        """The same, while the accounts of prefill and decode are kept apart."""
        self._forward.take_stats()
        prefill: PassStats | None = None
        num_generated = 0
        try:
            for piece in pieces:
                prefill = prefill or self._forward.take_stats()
                num_generated += piece.token is not None
                if num_generated % TOKENS_PER_SAMPLE == 1:
                    self._peak.sample()
                yield piece
        finally:
            self._peak.sample()
            rest = self._forward.take_stats()
            decode = rest if prefill else PassStats()
            timing = self.generator.timing
            self.report = Report(timing, prefill or rest, decode, num_generated, self._peak.peak_bytes)


def constraint_of(spec: ConstraintSpec, grammars: Grammars | None) -> Constraint:
    """Raises UsageError where it cannot be followed, or no memory is kept for any."""
    if grammars is None:
        raise UsageError("this engine keeps no memory for constraints", hint="open it with constraints=True")
    return grammars.constraint(spec)


def start_answering(
    forward: Forward,
    model: ModelFile,
    plan: Plan,
    adapters: Callable[[], Loaded],
    prefill_tokens: int | None,
    interrupt: Interrupt,
    peak: PeakSampler,
    clock: Clock,
) -> Answering:
    """`adapters` are those that are loaded when a request comes; `prefill_tokens` of prompts share a pass."""
    generator = Generator(forward, model.manifest.hyper.vocab_size, plan.context_tokens, clock)
    generator.use_adapters([weights_of(None, adapters())])
    grammars = Grammars(model.tokenizer, model.manifest.hyper.vocab_size) if plan.blueprint.config.constraints else None
    make_constraint = partial(constraint_of, grammars=grammars)
    settings = BatchSettings(generator.limits, DEFAULT_QUEUE, prefill_tokens, make_constraint)
    batcher = Batcher(forward, model.tokenizer, settings, interrupt, clock)
    loop = RequestLoop(batcher, lambda choice: weights_of(choice, adapters()))
    return Answering(generator, batcher, loop, forward, model.tokenizer, peak, clock, grammars)
