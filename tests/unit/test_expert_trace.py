"""pipeline.expert_trace: records of routing, hostile ones too, and the misses of policies replayed on them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pipo.base.errors import MalformedTrace
from pipo.pipeline.expert_trace import (
    BlockVisit,
    ExpertTrace,
    TraceHead,
    TraceWriter,
    misses_of_belady,
    misses_of_cache,
    misses_of_lru,
    policies,
    read_trace,
    routing_of,
)
from pipo.pipeline.routing import Routing

HEAD = TraceHead("m", 2, 8, 2)


def skewed(num_passes: int, seed: int = 0) -> ExpertTrace:
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 9)
    visits = [
        BlockVisit(block, [sorted(rng.choice(8, 2, replace=False, p=shares / shares.sum()).tolist())])
        for _ in range(num_passes)
        for block in range(2)
    ]
    return ExpertTrace(HEAD, visits)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, trace = tmp_path / "t", skewed(5)
    with path.open("w") as file:
        writer = TraceWriter(file, HEAD)
        for visit in trace.visits:
            writer.note(visit.block, Routing(np.asarray(visit.experts), np.ones((1, 2), np.float32)))
    assert read_trace(path) == trace


def test_passes_begin_where_blocks_do_not_ascend() -> None:
    assert [[visit.block for visit in visits] for visits in skewed(3).passes()] == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not json", "line 2: is not JSON"),
        ("[0]", "line 2: wanted"),
        ("[2,[[0,1]]]", "block below 2"),
        ("[0,[]]", "line 2: wanted"),
        ("[0,[[0]]]", "tokens of 2 experts"),
        ("[0,[[0,8]]]", "below 8"),
        ("[0,[[0,-1]]]", "below 8"),
        ("[0,[[0,1.0]]]", "below 8"),
        ("[0,[[0,true]]]", "below 8"),
        ('{"a":1}', "line 2: wanted"),
        ("[" * 100_000, "line 2: is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    head = {"format": "pipo experts 1", "model": "m", "num_blocks": 2, "num_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "t").write_text(f"{json.dumps(head)}\n{line}\n")
    with pytest.raises(MalformedTrace, match=says):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    "head",
    [
        "",
        "[]",
        "{}",
        '{"format":"pipo experts 1"}',
        '{"format":"pipo experts 1","num_blocks":1,"num_experts":2,"num_experts_per_tok":3}',
    ],
)
def test_a_bad_head_is_refused(tmp_path: Path, head: str) -> None:
    (tmp_path / "t").write_text(head)
    with pytest.raises(MalformedTrace):
        read_trace(tmp_path / "t")
    with pytest.raises(MalformedTrace, match="cannot read"):
        read_trace(tmp_path / "absent")


def test_nobody_misses_less_than_belady() -> None:
    for seed, slots in product(range(5), (2, 3, 5, 8, 15)):
        misses = dict(policies(skewed(200, seed), slots))
        assert min(misses.values()) == misses["Belady"] > 0, (seed, slots)


def test_belady_is_the_least_of_all_choices() -> None:
    """Small enough to try every order of who goes."""
    trace = ExpertTrace(TraceHead("m", 1, 4, 1), [BlockVisit(0, [[e]]) for e in (0, 1, 2, 0, 3, 1, 0, 2, 3, 1)])

    def least(i: int, held: frozenset[int]) -> int:
        if i == len(trace.visits):
            return 0
        (expert,) = trace.visits[i].needed
        if expert in held:
            return least(i + 1, held)
        if len(held) < 2:
            return 1 + least(i + 1, held | {expert})
        return 1 + min(least(i + 1, (held - {goes}) | {expert}) for goes in held)

    assert misses_of_belady(trace, 2) == least(0, frozenset())


def test_with_room_for_all_each_is_missed_once() -> None:
    trace = skewed(300)
    num = len({(visit.block, expert) for visit in trace.visits for expert in visit.needed})
    assert {count for _, count in policies(trace, 16)} == {num}


def test_lru_by_hand() -> None:
    trace = ExpertTrace(TraceHead("m", 1, 4, 1), [BlockVisit(0, [[e]]) for e in (0, 1, 0, 2, 1, 0)])
    assert misses_of_lru(trace, 2) == 5


def test_frequency_beats_recency_where_nothing_drifts() -> None:
    trace = skewed(1000)
    assert misses_of_cache(trace, 6, 1e6) < misses_of_lru(trace, 6)


def test_what_a_trace_says_of_misses() -> None:
    routing = routing_of(skewed(300), "here")
    assert routing.misses is not None and "here" in routing.source
    rates = [rate for _, rate in routing.misses]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < rates[0] <= 1
    with pytest.raises(MalformedTrace, match="no pass of a single token"):
        routing_of(ExpertTrace(HEAD, [BlockVisit(0, [[0, 1], [1, 2]])]), "prompt")
