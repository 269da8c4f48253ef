"""generation.request_loop: what has come shares the next pass."""

from __future__ import annotations

from collections.abc import Iterator

from pipo.base.errors import UsageError
from pipo.generation.inbox import Iterated
from pipo.generation.request import GenerationRequest, SamplingParams
from pipo.generation.request_loop import RequestLoop
from tests.support.arithmetic_passes import VOCAB, ArithmeticPasses
from tests.support.batching import Bench

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


def _requests(num: int) -> Iterator[GenerationRequest]:
    return (GenerationRequest([1 + i, 2, 3], GREEDY) for i in range(num))


def test_all_that_have_come_join_the_same_pass() -> None:
    bench = Bench(ArithmeticPasses(4, max_tokens=64))
    inbox = Iterated(_requests(6), lambda: bench.batcher.has_free_slot)
    told = list(RequestLoop(bench.batcher, lambda adapters: {}).run(inbox))
    assert [len(spans) for spans in bench.passes.passes] == [4, 4, 4, 2, 2, 2]
    assert {request_id for events in told for request_id, _ in events} == set(range(6))


def test_a_refusal_is_said_before_more_is_taken() -> None:
    bench = Bench(ArithmeticPasses(2))
    taken: list[int] = []

    def requests() -> Iterator[GenerationRequest]:
        for i in range(3):
            taken.append(i)
            yield GenerationRequest([VOCAB if i == 0 else 1], GREEDY)

    inbox = Iterated(requests(), lambda: bench.batcher.has_free_slot)
    steps = RequestLoop(bench.batcher, lambda adapters: {}).run(inbox)
    ((request_id, error),) = next(steps)
    assert request_id == 0 and isinstance(error, UsageError) and taken == [0]
    list(steps)
    assert taken == [0, 1, 2] and bench.batcher.is_idle
