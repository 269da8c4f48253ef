"""Sequences that come, share passes and go, in an order drawn by chance; and each of them by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipo.pipeline.adapters import Weights
from pipo.pipeline.forward import Forward
from pipo.pipeline.spans import Span
from tests.support.rigs import FloatArray


@dataclass(frozen=True, slots=True)
class Request:
    """`prompt`, then the `answer` token by token, whatever the model would say."""

    prompt: Sequence[int]
    answer: Sequence[int]
    adapters: Weights = field(default_factory=dict)

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.answer]


@dataclass(slots=True)
class Served:
    """By request: logits from its prompt's last token on, and where its spans ended. What passes were like."""

    logits: dict[int, list[FloatArray]] = field(default_factory=dict)
    ends: dict[int, list[int]] = field(default_factory=dict)
    num_mixed: int = 0  # passes with both decode rows and longer spans
    num_with_holes: int = 0
    slots: dict[int, int] = field(default_factory=dict)


def random_requests(vocab_size: int, lengths: Sequence[tuple[int, int]], adapters: Sequence[Weights]) -> list[Request]:
    """With prompts and answers of these lengths."""
    rng = np.random.default_rng(11)

    def tokens(num: int) -> list[int]:
        return [int(token) for token in rng.integers(3, vocab_size, num)]

    return [Request(tokens(p), tokens(a), adapters[i % len(adapters)]) for i, (p, a) in enumerate(lengths)]


def serve(forward: Forward, requests: Sequence[Request], seed: int) -> Served:
    """All of them, as many at a time as there are sequences, until each has been answered."""
    rng, served = np.random.default_rng(seed), Served()
    waiting, active, done = list(range(len(requests))), dict[int, int](), [0] * len(requests)
    while waiting or active:
        free = [slot for slot in range(forward.num_sequences) if slot not in active]
        if waiting and free and (not active or rng.random() < 0.6):
            slot = int(rng.choice(free))
            active[slot] = served.slots[slot] = waiting.pop(0)
        spans = list(_spans(forward, requests, active, done, rng))
        if not spans:
            continue
        forward.use_adapters([requests[active[s]].adapters if s in active else {} for s in range(max(active) + 1)])
        rows = forward.run_spans(spans).copy()
        _note(served, spans, active, rows)
        for span in spans:
            request = active[span.sequence]
            done[request] = span.end
            if span.end == len(requests[request].text):
                del active[span.sequence]
                forward.release(span.sequence)
    return served


def _spans(
    forward: Forward, requests: Sequence[Request], active: Mapping[int, int], done: Sequence[int],
    rng: np.random.Generator,
) -> Iterator[Span]:  # fmt: skip
    """Of most of the active ones: chunks of prompts of any length, one token of an answer."""
    budget = forward.max_tokens
    for slot in rng.permutation(list(active)).tolist():
        if not budget or rng.random() < 0.15:
            continue
        request, start = requests[active[slot]], done[active[slot]]
        left = len(request.prompt) - start
        num = int(rng.integers(1, min(budget, left) + 1)) if left > 0 else 1
        budget -= num
        yield Span(slot, start, request.text[start : start + num], start + num >= len(request.prompt))


def _note(served: Served, spans: Sequence[Span], active: Mapping[int, int], rows: FloatArray) -> None:
    wanting = [span for span in spans if span.wants_logits]
    assert len(rows) == len(wanting)
    for span, row in zip(wanting, rows, strict=True):
        served.logits.setdefault(active[span.sequence], []).append(row)
    for span in spans:
        served.ends.setdefault(active[span.sequence], []).append(span.end)
    singles = sorted(span.sequence for span in spans if span.num_tokens == 1)
    served.num_mixed += 0 < len(singles) < len(spans)
    served.num_with_holes += bool(singles) and singles[-1] - singles[0] >= len(singles)


def alone(forward: Forward, request: Request, ends: Sequence[int], sequence: int = 0) -> FloatArray:
    """The same in passes of its own, which end where those did. Shape: (1 + answer, vocab)."""
    forward.forget()
    forward.use_adapters([*[{}] * sequence, request.adapters])
    rows, start = [], 0
    for end in ends:
        outputs = [end - start - 1] if end >= len(request.prompt) else []
        found = forward.run(request.text[start:end], start, outputs, sequence)
        rows += [found[0].copy()] if outputs else []
        start = end
    return np.stack(rows)
