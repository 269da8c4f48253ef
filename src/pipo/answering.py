"""Requests as the compute thread runs them, and what the last one cost."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from pipo.base.errors import UsageError
from pipo.generation.answer import Piece
from pipo.generation.constraints import Constraint, Grammars
from pipo.generation.loop import Generator, Timing
from pipo.generation.request import ConstraintSpec, SamplingParams
from pipo.generation.scoring import Scorer
from pipo.generation.windows import Windows
from pipo.hardware.memory import PeakSampler
from pipo.pipeline.adapters import Weights
from pipo.pipeline.forward import Forward
from pipo.pipeline.stats import PassStats
from pipo.text.contract import ModelTokenizer

TOKENS_PER_SAMPLE = 16  # of the memory in use: between two passes, with caches cold, a sample takes 0.1 ms

Pieces = abc.Generator[tuple[int, Piece], None, None]  # of several answers, each with the index of its prompt


@dataclass(frozen=True, slots=True)
class Report:
    """What the last request cost. `prefill` and `decode` count their own passes."""

    timing: Timing
    prefill: PassStats
    decode: PassStats
    num_generated: int
    peak_anonymous_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of decode, as the caller sees it: tokens after the first. 0 when there were none."""
        return self.timing.num_decoded / self.timing.decode_s if self.timing.decode_s else 0.0


class Answering:
    """`report` is that of the last request. Threads: the one that computes."""

    def __init__(
        self,
        generator: Generator,
        forward: Forward,
        tokenizer: ModelTokenizer,
        peak: PeakSampler,
        grammars: Grammars | None = None,
    ) -> None:
        self.report: Report | None = None
        self.generator = generator
        self._forward = forward
        self._tokenizer = tokenizer
        self._peak = peak
        self._grammars = grammars

    def constraint(self, spec: ConstraintSpec) -> Constraint:
        """For one answer. Raises UsageError where it cannot be followed, or no memory is kept for any. Threads: any."""
        if self._grammars is None:
            raise UsageError("this engine keeps no memory for constraints", hint="open it with constraints=True")
        return self._grammars.constraint(spec)

    def answer(
        self,
        prompt: list[int],
        params: SamplingParams,
        weights: Weights,
        on_prefill: Callable[[int, int], None],
        constraint: Constraint | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> Iterator[Piece]:
        self.generator.use_adapters([weights])
        detokenizer = self._tokenizer.detokenizer(prompt, shown, keeps_space=constraint is not None)

        def note_chunk(done: int, total: int) -> None:
            self._peak.sample()
            on_prefill(done, total)

        ends = self._tokenizer.end_ids
        pieces = self.generator.generate(prompt, params, ends, detokenizer, note_chunk, constraint)
        with closing(self._accounted((0, piece) for piece in pieces)) as accounted:
            for _, piece in accounted:
                yield piece

    def answer_batch(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], weights: Sequence[Weights]
    ) -> Pieces:
        self.generator.use_adapters(weights)
        detokenizers = [self._tokenizer.detokenizer(prompt) for prompt in prompts]
        return self._accounted(self.generator.generate_batch(prompts, params, self._tokenizer.end_ids, detokenizers))

    def score(self, windows: Windows, scorer: Scorer, weights: Weights) -> Iterator[int]:
        """Tokens of each pass."""
        self.generator.use_adapters([weights])
        self._forward.take_stats()
        num_done = 0
        try:
            for num_tokens in self.generator.score(windows, scorer):
                self._peak.sample()
                num_done += num_tokens
                yield num_tokens
        finally:
            self.report = Report(Timing(num_done, 0), self._forward.take_stats(), PassStats(), 0, self._peak.peak_bytes)

    def _accounted(self, pieces: Iterator[tuple[int, Piece]]) -> Pieces:
        """The same, while the accounts of prefill and decode are kept apart."""
        self._forward.take_stats()
        prefill: PassStats | None = None
        num_generated = 0
        try:
            for i, piece in pieces:
                prefill = prefill or self._forward.take_stats()
                num_generated += piece.token is not None
                if num_generated % TOKENS_PER_SAMPLE == 1:
                    self._peak.sample()
                yield i, piece
        finally:
            self._peak.sample()
            rest = self._forward.take_stats()
            decode = rest if prefill else PassStats()
            timing = self.generator.timing
            self.report = Report(timing, prefill or rest, decode, num_generated, self._peak.peak_bytes)
