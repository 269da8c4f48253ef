"""The batcher over the real engine: requests that come and go get what each gets alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.random_model import SHAPES, write_random_model
from pipo.base.errors import Cancelled, PipoError, UsageError
from pipo.engine import Engine
from pipo.generation.answer import Piece
from pipo.generation.events import RequestId
from pipo.generation.request import GenerationRequest, SamplingParams, Summary, copies_of
from tests.support.engines import PLENTY, smallest_ram_bytes, start_engine
from tests.support.ties import part_at_a_tie, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
TEXTS = [
    "The capital of France is", "1, 2, 3, 4,", "Once upon a time there was a little girl who", "Water is made of",
    "My name is", "The opposite of cold is", "In the year 1815 the battle of", "def fibonacci(n):\n",
]  # fmt: skip
SYSTEM = (
    "You are a careful assistant of a library. You answer in one short sentence, you never invent titles, and you say "
    "so when you do not know. The reader asks: "
)


class Answers:
    """Of requests, by their numbers."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], cancels: int | None = None) -> None:
        """The request `cancels` is cancelled at its third piece."""
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        self.ends: dict[int, object] = {}
        with closing(engine.stream_requests(requests)) as events:
            for number, what in events:
                if isinstance(what, Piece):
                    self.pieces[number].append(what)
                    if number == cancels and len(self.pieces[number]) == 3:
                        engine.batcher.cancel(RequestId(number))
                else:
                    self.ends[number] = what

    def summary(self, number: int) -> Summary:
        found = self.ends[number]
        assert isinstance(found, Summary), found
        return found


@pytest.mark.parametrize("is_tight", [True, False])
def test_eight_prompts_together_are_each_alone(smollm2_path: Path, is_tight: bool) -> None:
    settings = {"context_tokens": 128, "prefill_chunk": 16, "num_sequences": 8}
    ram_bytes = smallest_ram_bytes(smollm2_path, **settings) if is_tight else PLENTY
    with start_engine(smollm2_path, ram_bytes=ram_bytes, **settings) as engine:
        prompts = [engine.encode(text) for text in TEXTS]
        want = [engine.complete(prompt, GREEDY).tokens for prompt in prompts]
        answers = Answers(engine, [GenerationRequest(prompt, GREEDY) for prompt in prompts])
        report = engine.report
    parted = [part_at_a_tie(tokens_of(answers.pieces[i]), want[i]) for i in range(len(prompts))]
    assert sum(parted) <= 2, "ties are rare"
    assert report is not None and report.num_generated == 8 * 16
    for number, prompt in enumerate(prompts):
        assert answers.summary(number).usage.prompt_tokens == len(prompt)


def test_more_requests_than_sequences_of_any_length(smollm2_path: Path) -> None:
    lengths = [1, 30, 5, 12, 3, 40, 2, 9]
    with start_engine(smollm2_path, num_sequences=3, context_tokens=256) as engine:
        prompts = [engine.encode(text) for text in TEXTS]
        params = [replace(GREEDY, max_tokens=length) for length in lengths]
        want = [engine.complete(prompt, each).tokens for prompt, each in zip(prompts, params, strict=True)]
        requests = [GenerationRequest(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        answers = Answers(engine, requests, cancels=5)
    assert isinstance(answers.ends[5], Cancelled) and 3 <= len(answers.pieces[5]) < 40
    for number in set(range(8)) - {5}:
        assert len(tokens_of(answers.pieces[number])) == lengths[number]
        part_at_a_tie(tokens_of(answers.pieces[number]), want[number])


def test_a_changed_tail_of_a_system_prompt_costs_the_changed_part(smollm2_path: Path) -> None:
    with start_engine(smollm2_path, num_sequences=2, context_tokens=256) as engine:
        shared = len(engine.encode(SYSTEM.rstrip()))
        prompts = [engine.encode(SYSTEM + question) for question in ("Who wrote Emma?", "Is it open on Sundays?")]
        want = [engine.complete(prompt, GREEDY).tokens for prompt in prompts]
        first = Answers(engine, [GenerationRequest(prompts[0], GREEDY)])
        second = Answers(engine, [GenerationRequest(prompts[1], GREEDY)])
        again = Answers(engine, [GenerationRequest(prompts[0], GREEDY)])
    assert first.summary(0).usage.cached_tokens == 0
    assert shared <= second.summary(0).usage.cached_tokens < len(prompts[1])
    assert again.summary(0).usage.cached_tokens >= shared
    for found, expected in ((first, want[0]), (second, want[1]), (again, want[0])):
        part_at_a_tie(tokens_of(found.pieces[0]), expected)


def test_copies_of_a_request_have_one_prompt_and_answers_of_their_own(smollm2_path: Path) -> None:
    with start_engine(smollm2_path, num_sequences=4, context_tokens=256) as engine:
        request = GenerationRequest(engine.encode(SYSTEM + TEXTS[2]), SamplingParams(seed=3, max_tokens=12))
        answers = Answers(engine, copies_of(request, 4))
        totals = engine.totals
        computed = sum(len(request.prompt) - answers.summary(i).usage.cached_tokens for i in range(4))
        generated = sum(len(answers.pieces[i]) for i in range(4))
        assert totals.num_tokens == computed + generated - 4, "what is said to be cached was not computed"
    texts = {"".join(piece.text for piece in answers.pieces[i]) for i in range(4)}
    assert len(texts) > 1


def test_leaving_early_leaves_the_engine_usable(tmp_path: Path) -> None:
    write_random_model(tmp_path / "smoke.gguf", "smoke", "q4_0")
    random = np.random.default_rng(3)
    prompts = [[int(t) for t in random.integers(3, SHAPES["smoke"].vocab_size, 9)] for _ in range(4)]
    with start_engine(tmp_path / "smoke.gguf", num_sequences=2, context_tokens=1024) as engine:
        want = engine.complete(prompts[0], GREEDY).token_ids
        long = [GenerationRequest(prompt, replace(GREEDY, max_tokens=1000)) for prompt in prompts]
        for num_taken in (0, 1, 30):
            with closing(engine.stream_requests(long)) as events:
                for _ in range(num_taken):
                    next(events)
            assert engine.batcher.is_idle
            assert engine.complete(prompts[0], GREEDY).token_ids == want
            assert engine.complete_batch(prompts[:1], GREEDY)[0].token_ids == want
        engine.cancel()
        assert engine.complete_batch(prompts, GREEDY)[0].token_ids == want


def test_a_request_that_cannot_be_answered_ends_alone(smollm2_path: Path) -> None:
    with start_engine(smollm2_path, num_sequences=2, context_tokens=64) as engine:
        good = GenerationRequest(engine.encode(TEXTS[0]), GREEDY)
        bad = [replace(good, prompt=[5] * 70), replace(good, adapters="style"), replace(good, prompt=[])]
        answers = Answers(engine, [bad[0], good, bad[1], good, bad[2]])
    for number in (0, 2, 4):
        assert isinstance(answers.ends[number], PipoError)
    assert isinstance(answers.ends[2], UsageError)
    assert tokens_of(answers.pieces[1]) == tokens_of(answers.pieces[3])
