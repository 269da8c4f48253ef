"""generation.slots and the batcher: what is computed already is not computed again, nothing else is taken for it."""

from __future__ import annotations

import pytest

from pipo.base.errors import Cancelled
from pipo.generation.events import RequestId
from pipo.generation.request import FinishReason
from pipo.generation.slots import common_prefix
from tests.support.arithmetic_passes import ArithmeticPasses, answer_alone
from tests.support.batching import Bench

SYSTEM = [7, 8, 9] * 8
STYLE, TONE = {"style": 1.0}, {"tone": 0.5}


def ask(bench: Bench, number: int, prompt: list[int], weights: dict[str, float] | None = None) -> int:
    """Tokens of the prompt that were not computed. The answer is the one it gets alone."""
    before = bench.passes.num_computed
    bench.submit(number, prompt, weights, max_tokens=4)
    bench.run()
    assert bench.tokens(number) == answer_alone(prompt, 4, weights)
    usage = bench.summary(number).usage
    num_passes = len(bench.pieces[number])
    assert bench.passes.num_computed - before == len(prompt) - usage.cached_tokens + num_passes - 1
    return usage.cached_tokens


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("can_copy", [True, False])
def test_a_conversation_that_goes_on(num_sequences: int, can_copy: bool) -> None:
    bench = Bench(ArithmeticPasses(num_sequences, 16, can_copy))
    assert ask(bench, 0, SYSTEM) == 0
    turn = [*SYSTEM, *bench.tokens(0), 5, 6]
    assert bench.pieces[0][-1].finish is FinishReason.STOP, "so that all of its tokens were computed"
    assert ask(bench, 1, turn) == len(SYSTEM) + len(bench.tokens(0))
    assert ask(bench, 2, turn) == len(turn) - 1, "the last token of a prompt is always computed"


@pytest.mark.parametrize("can_copy", [True, False])
def test_a_changed_tail_costs_the_changed_part(can_copy: bool) -> None:
    bench = Bench(ArithmeticPasses(2, 16, can_copy))
    ask(bench, 0, [*SYSTEM, 1, 2, 3])
    assert ask(bench, 1, [*SYSTEM, 4, 5]) == len(SYSTEM)


def test_a_shared_beginning_is_copied_and_the_conversation_it_is_from_stays() -> None:
    bench = Bench(ArithmeticPasses(3, 16))
    long = [*SYSTEM, *range(1, 30)]
    ask(bench, 0, long)
    assert ask(bench, 1, [*SYSTEM, 40, 41]) == len(SYSTEM) and bench.passes.num_copied == len(SYSTEM)
    assert ask(bench, 2, [*long, 50]) == len(long)


def test_conversations_that_begin_alike_keep_what_is_theirs() -> None:
    """Each is shorter than what they share; a third one takes the place of the one that was used longest ago."""
    bench = Bench(ArithmeticPasses(2, 16))
    talks = [[*SYSTEM, *range(1, 12)], [*SYSTEM, *range(40, 50)]]
    assert [ask(bench, number, talk) for number, talk in enumerate(talks)] == [0, len(SYSTEM)]
    for turn in (2, 4):
        for i, talk in enumerate(talks):
            talk += [50 + turn, 51]
            assert ask(bench, turn + i, talk) == len(talk) - 2
    assert ask(bench, 6, [*SYSTEM, 60]) == len(SYSTEM)
    assert ask(bench, 7, [*talks[1], 61]) == len(talks[1])


def test_a_conversation_whose_last_answer_is_dropped_goes_on_in_place() -> None:
    """As templates do with thoughts: nobody else is given up for it."""
    bench = Bench(ArithmeticPasses(2, 16))
    other, talk = [60] * 40, [*SYSTEM, *range(1, 20)]
    ask(bench, 0, other)
    ask(bench, 1, [*talk, 62, 63])
    assert ask(bench, 2, [*talk, 41, 42]) == len(talk) and bench.passes.num_copied == 0
    assert ask(bench, 3, [*other, 42]) == len(other)


def test_few_tokens_are_computed_rather_than_copied() -> None:
    bench = Bench(ArithmeticPasses(2, 16))
    ask(bench, 0, [7, 8, *range(20, 50)])
    assert ask(bench, 1, [7, 8, 1, 2, 3]) == 0 and bench.passes.num_copied == 0


def test_the_one_used_longest_ago_is_given_up_first() -> None:
    bench = Bench(ArithmeticPasses(2, 16))
    first, second, third = [1] * 20, [2] * 20, [3] * 20
    for number, prompt in enumerate((first, second, first, third)):
        ask(bench, number, prompt)
    assert ask(bench, 4, first) == 19
    assert ask(bench, 5, second) == 0


def test_adapters_have_keys_and_values_of_their_own() -> None:
    bench = Bench(ArithmeticPasses(3, 16))
    assert [ask(bench, i, SYSTEM, weights) for i, weights in enumerate((None, STYLE, TONE))] == [0, 0, 0]
    assert [ask(bench, 3 + i, SYSTEM, weights) for i, weights in enumerate((None, STYLE, TONE))] == [23, 23, 23]


@pytest.mark.parametrize("can_copy", [True, False])
def test_equal_prompts_are_computed_once_where_rows_can_be_copied(can_copy: bool) -> None:
    bench = Bench(ArithmeticPasses(4, 10, can_copy))
    for number in range(4):
        bench.submit(number, SYSTEM, temperature=1, seed=number, max_tokens=5, ignore_eos=True)
    bench.run()
    cached = [bench.summary(number).usage.cached_tokens for number in range(4)]
    assert cached == [0, *[23 if can_copy else 0] * 3]
    computed = 24 + 3 * (1 if can_copy else 24) + 4 * 4
    assert bench.passes.num_computed == computed
    assert bench.batcher.counters.cached_tokens == sum(cached)
    assert len({tuple(bench.tokens(number)) for number in range(4)}) == 4, "each has a seed of its own"


def test_who_waits_for_a_prompt_goes_on_where_that_is_cancelled() -> None:
    bench = Bench(ArithmeticPasses(3, 10))
    bench.submit(0, SYSTEM)
    bench.submit(1, SYSTEM)
    bench.submit(2, [*SYSTEM, 3])
    bench.step()
    bench.batcher.cancel(RequestId(0))
    bench.run()
    assert isinstance(bench.ends[0], Cancelled)
    assert bench.summary(1).usage.cached_tokens == 10, "what the first had computed"
    assert bench.tokens(1) == answer_alone(SYSTEM, 6) and bench.tokens(2) == answer_alone([*SYSTEM, 3], 6)


def test_what_is_forgotten_is_computed_again() -> None:
    bench = Bench(ArithmeticPasses(2, 16))
    ask(bench, 0, SYSTEM)
    bench.batcher.forget()
    assert not any(bench.passes.rows)
    assert ask(bench, 1, SYSTEM) == 0


def test_a_window_that_has_slid_away_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(ArithmeticPasses(1, 16))
    ask(bench, 0, SYSTEM)
    monkeypatch.setattr(bench.passes, "can_resume", lambda position: position == 0)
    assert ask(bench, 1, SYSTEM) == 0


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 600])
def test_common_prefix(length: int) -> None:
    same = list(range(length))
    assert common_prefix([*same, 1, 5], [*same, 2, 5]) == length
    assert common_prefix(same, [*same, 9]) == common_prefix([*same, 9], same) == length
