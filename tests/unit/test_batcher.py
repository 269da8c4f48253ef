"""generation.batcher: every sequence gets what it gets alone, whoever comes and goes beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pipo.base.errors import (
    Cancelled,
    ComputeError,
    ContextOverflow,
    EngineBusy,
    PipoError,
    ReadFailed,
    UsageError,
)
from pipo.generation.batcher import BatchSettings
from pipo.generation.events import Embedding, RequestId
from pipo.generation.limits import Limits
from pipo.generation.request import (
    ConstraintKind,
    ConstraintSpec,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    copies_of,
)
from pipo.generation.waiting import QueueSize
from pipo.pipeline.spans import Span
from tests.support.arithmetic_passes import VOCAB, ArithmeticPasses, answer_alone, logits_after
from tests.support.batching import CONTEXT, Bench

FAILED = ReadFailed("could not read", path="model", offset=0, wanted_bytes=1, got_bytes=0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(each) for each in np.random.default_rng([length, seed]).integers(1, VOCAB, length)]


@pytest.mark.parametrize("can_copy", [True, False])
@pytest.mark.parametrize("num_sequences", [1, 2, 5])
@pytest.mark.parametrize("max_tokens", [5, 8, 64])
def test_each_gets_what_it_gets_alone(num_sequences: int, max_tokens: int, can_copy: bool) -> None:
    bench = Bench(ArithmeticPasses(num_sequences, max_tokens, can_copy))
    prompts = [prompt_of(length) for length in (1, 30, 7, 30, 12, 3, 50, 1)]
    for number, prompt in enumerate(prompts):
        bench.submit(number, prompt, max_tokens=8)
    bench.run()
    assert [bench.tokens(i) for i in range(len(prompts))] == [answer_alone(prompt, 8) for prompt in prompts]
    for number, prompt in enumerate(prompts):
        usage = bench.summary(number).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(bench.tokens(number)))


def test_prompts_count_as_they_are_read() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=8))
    bench.submit(0, prompt_of(20), max_tokens=2, ignore_eos=True)
    seen = []
    while not bench.batcher.is_idle:
        bench.step()
        seen.append((bench.batcher.counters.prompt_tokens, bench.batcher.num_unread))
    assert seen == [(8, 12), (16, 4), (20, 0), (20, 0)]
    bench.submit(1, [*prompt_of(20), 1], max_tokens=1)  # most of it is there already
    bench.run()
    assert bench.summary(1).usage.cached_tokens == bench.batcher.counters.cached_tokens == 20
    assert bench.batcher.counters.prompt_tokens == 20 + 21
    bench.batcher.submit_embedding(RequestId(2), prompt_of(5), {})
    bench.run()
    assert bench.batcher.counters.prompt_tokens == 20 + 21 + 5


def test_a_pass_has_a_token_of_all_that_decode_and_parts_of_several_prompts() -> None:
    bench = Bench(ArithmeticPasses(4, max_tokens=40))
    bench.submit(0, prompt_of(3), max_tokens=30, ignore_eos=True)
    bench.step()
    for number, length in ((1, 50), (2, 20), (3, 6)):
        bench.submit(number, prompt_of(length, number))
    bench.step()
    lengths = {span.sequence: len(span.token_ids) for span in bench.passes.passes[-1]}
    assert lengths == {0: 1, 1: 19 + 4, 2: 10, 3: 6}, (
        "half, half of the rest, what it needs; the first has what is left"
    )


def test_a_long_prompt_starves_neither_short_ones_nor_those_that_decode() -> None:
    bench = Bench(ArithmeticPasses(3, max_tokens=64), prefill_tokens=4)
    bench.submit(0, prompt_of(2), max_tokens=40, ignore_eos=True)
    bench.step()
    bench.submit(1, prompt_of(60, 1), max_tokens=1)
    bench.submit(2, prompt_of(5, 2), max_tokens=1)
    for _ in range(15):
        bench.step()
    assert len(bench.pieces[0]) == 16, "a token in every pass"
    assert 2 in bench.ends and 1 not in bench.ends
    for spans in bench.passes.passes[1:]:
        assert sum(len(span.token_ids) for span in spans) <= 1 + 4
    bench.run()


def test_short_prompts_pass_a_long_one() -> None:
    bench = Bench(ArithmeticPasses(3, max_tokens=32))
    bench.submit(0, prompt_of(60), max_tokens=1)
    bench.submit(1, prompt_of(10, 1), max_tokens=1)
    bench.step()
    assert 1 in bench.ends and 0 not in bench.ends


def test_first_come_first_served() -> None:
    bench = Bench(ArithmeticPasses(1, max_tokens=8))
    for number in range(4):
        bench.submit(number, prompt_of(5, number), max_tokens=2, ignore_eos=True)
    assert (bench.batcher.num_waiting, bench.batcher.num_running) == (4, 0)
    bench.run()
    assert list(bench.ends) == [0, 1, 2, 3]


@pytest.mark.parametrize(("length", "max_tokens"), [(CONTEXT, None), (CONTEXT - 4, 5), (CONTEXT + 1, None)])
def test_what_never_fits_is_refused_with_numbers(length: int, max_tokens: int | None) -> None:
    bench = Bench(ArithmeticPasses())
    with pytest.raises(ContextOverflow, match=f"prompt of {length} tokens .* context of {CONTEXT}"):
        bench.submit(0, prompt_of(length), max_tokens=max_tokens)
    with pytest.raises(UsageError, match=f"token id {VOCAB} is outside"):
        bench.submit(0, [1, VOCAB])
    assert bench.batcher.is_idle


def test_an_answer_may_fill_the_context() -> None:
    bench = Bench(ArithmeticPasses())
    bench.submit(0, prompt_of(CONTEXT - 5), max_tokens=None, ignore_eos=True)
    bench.run()
    assert len(bench.tokens(0)) == 5 and bench.pieces[0][-1].finish is FinishReason.LENGTH


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    bench = Bench(ArithmeticPasses(), queue=QueueSize(num_requests=3, prompt_tokens=20))
    bench.submit(0, prompt_of(30))  # alone, whatever its length
    with pytest.raises(EngineBusy, match="1 requests with 30 tokens"):
        bench.submit(1, prompt_of(3))
    bench.step()
    for number in (1, 2, 3):
        bench.submit(number, prompt_of(3))
    with pytest.raises(EngineBusy):
        bench.submit(4, prompt_of(3))
    bench.run()
    assert sorted(bench.ends) == [0, 1, 2, 3]


def test_a_cancelled_request_leaves_and_the_others_go_on() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    prompts = [prompt_of(5, number) for number in range(4)]
    for number, prompt in enumerate(prompts):
        bench.submit(number, prompt, max_tokens=20, ignore_eos=True)
    bench.step()
    bench.batcher.cancel(RequestId(0))  # has a slot
    bench.batcher.cancel(RequestId(3))  # waits
    bench.step()
    assert isinstance(bench.ends[0], Cancelled) and isinstance(bench.ends[3], Cancelled)
    assert {span.sequence for span in bench.passes.passes[-1]} == {0, 1}, "the next one has its slot"
    bench.batcher.cancel(RequestId(0))  # has ended: says nothing
    bench.run()
    assert len(bench.tokens(1)) == len(bench.tokens(2)) == 20


def cancelling(bench: Bench, *numbers: int) -> None:
    """While the next pass runs, which ends where the flag is set."""

    def on_pass(spans: Sequence[Span]) -> None:
        bench.passes.on_pass = lambda spans: None
        for number in numbers:
            bench.batcher.cancel(RequestId(number))

    bench.passes.on_pass = on_pass
    bench.passes.fails = lambda: Cancelled("stopped") if bench.flag.is_set else None


def test_a_pass_is_ended_where_nobody_wants_it() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    bench.submit(0, prompt_of(5))
    cancelling(bench, 0)
    bench.step()
    assert not bench.pieces[0] and not bench.flag.is_set
    bench.submit(1, prompt_of(6))
    bench.run()
    assert isinstance(bench.ends[0], Cancelled) and bench.tokens(1) == answer_alone(prompt_of(6), 6)


def test_a_pass_goes_on_for_those_who_want_it() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    bench.submit(0, prompt_of(5))
    bench.submit(1, prompt_of(6))
    cancelling(bench, 0)
    bench.step()
    assert not bench.flag.is_set and len(bench.tokens(1)) == 1
    cancelling(bench, 1)
    bench.run()
    assert isinstance(bench.ends[0], Cancelled) and isinstance(bench.ends[1], Cancelled)


def test_a_late_interrupt_costs_a_pass_and_nothing_else() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    bench.submit(0, prompt_of(5))
    cancelling(bench, 0)
    bench.passes.fails = lambda: None  # the pass had ended already when the flag was set
    bench.step()
    bench.submit(1, prompt_of(6))
    bench.passes.fails = lambda: Cancelled("stopped") if bench.flag.is_set else None
    bench.run()
    assert bench.tokens(1) == answer_alone(prompt_of(6), 6)


def test_who_ends_everything_ends_everything() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    for number in range(3):
        bench.submit(number, prompt_of(5, number))
    bench.passes.fails = lambda: Cancelled("stopped")
    with pytest.raises(Cancelled):
        bench.step()
    bench.take(bench.batcher.drop_all(Cancelled("stopped")))
    assert bench.batcher.is_idle and all(isinstance(each, Cancelled) for each in bench.ends.values())
    assert len(bench.ends) == 3


def test_a_failed_pass_ends_those_that_share_it_and_the_next_go_on() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    prompts = [prompt_of(5, number) for number in range(3)]
    for number, prompt in enumerate(prompts):
        bench.submit(number, prompt)
    bench.step()
    bench.passes.fails = lambda: FAILED
    bench.step()
    assert bench.ends == {0: FAILED, 1: FAILED}
    bench.passes.fails = lambda: None
    bench.run()
    assert bench.tokens(2) == answer_alone(prompts[2], 6)
    bench.submit(3, prompts[1])
    bench.run()
    assert bench.tokens(3) == answer_alone(prompts[1], 6)
    assert bench.summary(3).usage.cached_tokens == 4, "what was computed before the failure is still there"


def test_bad_logits_end_one_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    for number in range(2):
        bench.submit(number, prompt_of(5, number))
    bench.step()
    run_spans = bench.passes.run_spans

    def bad_first(spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        logits = run_spans(spans)
        logits[0] = np.nan
        return logits

    monkeypatch.setattr(bench.passes, "run_spans", bad_first)
    bench.step()
    monkeypatch.undo()
    bench.run()
    assert isinstance(bench.ends[0], ComputeError) and bench.tokens(1) == answer_alone(prompt_of(5, 1), 6)


class Even:
    """Only even token ids, three of them."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def apply(self, logits: npt.NDArray[np.float32], *, goes_on: bool = False) -> npt.NDArray[np.float32]:
        masked = logits.copy()
        masked[1::2] = -np.inf
        masked[0] = -np.inf
        return masked

    def take(self, token_id: int) -> None:
        self.taken.append(token_id)

    @property
    def is_finished(self) -> bool:
        return len(self.taken) == 3


def make_even(spec: ConstraintSpec) -> Even:
    if spec.text == "bad":
        raise UsageError("a bad constraint")
    return Even()


def test_constraints_and_what_cannot_be_one() -> None:
    bench = Bench(ArithmeticPasses(3, max_tokens=16), make_constraint=make_even)
    params = SamplingParams(temperature=0, max_tokens=9)
    for number, text in enumerate(("good", "bad")):
        constraint = ConstraintSpec(ConstraintKind.REGEX, text)
        request = GenerationRequest(prompt_of(5), params, constraint=constraint)
        bench.batcher.submit(RequestId(number), request, {})
    bench.submit(2, prompt_of(4))
    bench.run()
    assert len(bench.tokens(0)) == 3 and all(token % 2 == 0 for token in bench.tokens(0))
    assert bench.pieces[0][-1].finish is FinishReason.STOP
    assert isinstance(bench.ends[1], UsageError) and bench.tokens(2) == answer_alone(prompt_of(4), 6)


def test_without_a_factory_constraints_are_refused() -> None:
    bench = Bench(ArithmeticPasses())
    request = GenerationRequest([1], SamplingParams(), constraint=ConstraintSpec(ConstraintKind.JSON_OBJECT))
    bench.batcher.submit(RequestId(0), request, {})
    bench.run()
    assert isinstance(bench.ends[0], UsageError)


def test_embeddings_come_between_answers() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    bench.submit(0, prompt_of(5))
    bench.batcher.submit_embedding(RequestId(1), prompt_of(7), {})
    with pytest.raises(ContextOverflow):
        bench.batcher.submit_embedding(RequestId(2), prompt_of(CONTEXT + 1), {})
    bench.run()
    found = bench.ends[1]
    assert isinstance(found, Embedding)
    wanted = logits_after([(token, "{}") for token in prompt_of(7)])
    np.testing.assert_allclose(found.vector, wanted / np.linalg.norm(wanted), rtol=1e-6)
    assert np.linalg.norm(found.vector) == pytest.approx(1)
    assert bench.tokens(0) == answer_alone(prompt_of(5), 6)


@pytest.mark.parametrize("error", [FAILED, Cancelled("stopped")])
def test_an_embedding_that_fails_or_is_cancelled(error: PipoError) -> None:
    bench = Bench(ArithmeticPasses(1, max_tokens=16))
    bench.batcher.submit_embedding(RequestId(0), prompt_of(7), {})
    if isinstance(error, Cancelled):
        bench.passes.fails = lambda: bench.batcher.cancel(RequestId(0)) or error
    else:
        bench.passes.fails = lambda: error
    bench.step()
    bench.passes.fails = lambda: None
    bench.submit(1, prompt_of(5))
    bench.run()
    assert type(bench.ends[0]) is type(error) and bench.tokens(1) == answer_alone(prompt_of(5), 6)


def test_seeds_and_times_are_the_requests_own() -> None:
    bench = Bench(ArithmeticPasses(2, max_tokens=16))
    bench.passes.on_pass = lambda spans: bench.clock.sleep(1.0)
    for number in range(3):
        bench.submit(number, prompt_of(5), temperature=1, seed=7, max_tokens=4, ignore_eos=True)
    bench.run()
    assert bench.tokens(0) == bench.tokens(1) == bench.tokens(2)
    first, _, last = (bench.summary(number) for number in range(3))
    assert (first.queued_s, first.ttft_s, first.decode_s) == (0, 1, 3)
    assert last.queued_s >= 4 and last.ttft_s == last.queued_s + 1


def test_copies_have_seeds_of_their_own() -> None:
    request = GenerationRequest([1, 2], SamplingParams(seed=5))
    assert [each.params.seed for each in copies_of(request, 3)] == [5, 6, 7]
    assert copies_of(GenerationRequest([1], SamplingParams()), 2)[1].params.seed is None


def test_limits_are_those_of_the_settings() -> None:
    assert BatchSettings(Limits(10, 20), QueueSize(2, 30)).queue.num_bytes == 2 * 4096 + 120
