"""Whoever joins, leaves, fails or is cancelled beside it: a sequence gets what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from pipo.base.errors import Cancelled, ReadFailed
from pipo.generation.events import RequestId
from pipo.generation.prefill_shares import shares
from pipo.generation.request import Summary
from pipo.pipeline.spans import Span
from tests.support.arithmetic_passes import ArithmeticPasses, answer_alone
from tests.support.batching import Bench

FAILED = ReadFailed("could not read", path="model", offset=0, wanted_bytes=1, got_bytes=0)
NUM_TOKENS = 7
BEGINNINGS = [[], [5] * 18, [5] * 30, [*[5] * 18, *[6] * 12], [9, 8, 7] * 7]
ENDINGS = [[1], [2, 3], [4] * 9, list(range(1, 21))]
WEIGHTS: list[dict[str, float]] = [{}, {"style": 1.0}, {"style": 0.5}]

submissions = st.tuples(
    st.just("submit"), st.sampled_from(BEGINNINGS), st.sampled_from(ENDINGS), st.sampled_from(WEIGHTS)
)
steps = st.tuples(st.just("step"), st.integers(1, 6))
cancellations = st.tuples(st.sampled_from(["cancel", "cancel in a pass"]), st.integers(0, 20))
failures = st.tuples(st.just("fail"))
operations = st.lists(st.one_of(submissions, submissions, steps, cancellations, failures), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    operations=operations,
    num_sequences=st.integers(1, 4),
    spare=st.integers(0, 20),
    can_copy=st.booleans(),
    prefill_tokens=st.none() | st.integers(1, 6),
)
def test_each_gets_what_it_gets_alone(
    operations: Sequence[tuple[Any, ...]], num_sequences: int, spare: int, can_copy: bool, prefill_tokens: int | None
) -> None:
    bench = Bench(ArithmeticPasses(num_sequences, num_sequences + spare, can_copy), prefill_tokens=prefill_tokens)
    bench.passes.fails = lambda: Cancelled("stopped") if bench.flag.is_set else None
    asked: list[tuple[list[int], dict[str, float]]] = []
    cancelled: set[int] = set()
    num_failures = 0

    def do(what: str, *details: Any) -> None:
        nonlocal num_failures
        if what == "submit":
            beginning, ending, weights = details
            asked.append(([*beginning, *ending], weights))
            bench.submit(len(asked) - 1, asked[-1][0], weights, max_tokens=NUM_TOKENS)
        elif what == "step":
            for _ in range(details[0]):
                bench.step()
        elif what == "fail":
            num_failures += 1
            fails, bench.passes.fails = bench.passes.fails, lambda: FAILED
            bench.step()
            bench.passes.fails = fails
        else:
            cancelled.add(details[0])
            cancel(details[0], in_pass=what == "cancel in a pass")

    def cancel(number: int, in_pass: bool) -> None:
        if not in_pass:
            bench.batcher.cancel(RequestId(number))
            return

        def on_pass(spans: Sequence[Span]) -> None:
            bench.passes.on_pass = lambda spans: None
            bench.batcher.cancel(RequestId(number))

        bench.passes.on_pass = on_pass
        bench.step()
        bench.passes.on_pass = lambda spans: None

    for operation in operations:
        do(*operation)
    bench.run()
    for number, (prompt, weights) in enumerate(asked):
        want, found, end = answer_alone(prompt, NUM_TOKENS, weights), bench.tokens(number), bench.ends[number]
        if isinstance(end, Summary):
            assert found == want
            assert end.usage.completion_tokens == len(want) and end.usage.cached_tokens < len(prompt)
        else:
            assert found == want[: len(found)]
            assert (end is FAILED and num_failures) or (isinstance(end, Cancelled) and number in cancelled)
    assert (bench.batcher.num_running, bench.batcher.num_waiting) == (0, 0)
    bench.batcher.forget()
    assert not any(bench.passes.rows), "every row was given back"


@given(st.lists(st.integers(1, 100), max_size=8), st.integers(0, 200))
def test_shares_use_all_the_room_and_the_first_has_the_most(remaining: list[int], room: int) -> None:
    given = shares(remaining, room)
    assert sum(given) == min(room, sum(remaining))
    assert all(0 <= part <= wanted for part, wanted in zip(given, remaining, strict=True))
    if remaining and room:
        assert given[0] >= min(remaining[0], room // 2 or 1)
    if len(remaining) > 1 and room > 1:
        assert given[1] > 0, "the second is not starved"
