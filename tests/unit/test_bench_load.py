"""The load bench asks a real server, and calls wrong what is wrong."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest
from rich.console import Console

from bench.load import Sample, Tally, _load, _parse, report
from tests.support.fake_engine import FakeEngine
from tests.support.serving import running, small_prompts

QUIET = Console(quiet=True)
PROMPTS = small_prompts()
IDLE = Sample(0.0, 100, 50, 0, 0)


def test_clients_ask_leave_and_are_counted() -> None:
    engine = FakeEngine(PROMPTS.tokenizer, context_tokens=8192, delay_s=0.001)
    with running(engine, PROMPTS) as server:
        tally, samples = asyncio.run(_load(server.url, os.getpid(), 4, 1.5, seed=3))
    assert tally.statuses["200"] == len(engine.requests) > 4 and not tally.errors
    assert len(tally.ttfts_s) + tally.num_left == tally.statuses["200"]
    assert tally.num_left and engine.num_running == 0
    assert samples[-1].num_running == 0 and samples[0].anonymous_bytes > 10 * 1024 * 1024
    assert report(QUIET, tally, samples, limit_bytes=1 << 40) == 0


def test_an_engine_that_fails_is_found_out() -> None:
    engine = FakeEngine(PROMPTS.tokenizer, context_tokens=8192, error=RuntimeError("no"), fail_at=2)
    with running(engine, PROMPTS) as server:
        tally, samples = asyncio.run(_load(server.url, os.getpid(), 2, 0.3, seed=3))
    assert tally.errors and report(QUIET, tally, samples, limit_bytes=1 << 40) == 1


def test_what_is_wrong() -> None:
    fine = Tally(ttfts_s=[0.1])
    assert report(QUIET, fine, [IDLE], 100) == 0
    assert report(QUIET, Tally(), [IDLE], 100) == 1, "no answer"
    assert report(QUIET, fine, [IDLE], 99) == 1, "more memory than the limit"
    assert report(QUIET, fine, [IDLE, Sample(1.0, 10, 5, 1, 0)], 100) == 1, "somebody left, and is still answered"
    for status, code in (("200", 0), ("429", 0), ("500", 1), ("401", 1)):
        fine.statuses.clear()
        fine.statuses[status] = 1
        assert report(QUIET, fine, [IDLE], 100) == code


@pytest.mark.parametrize("which", ["anonymous_bytes", "ledger_bytes"])
def test_memory_that_grows_is_found_out(which: str) -> None:
    fine = Tally(ttfts_s=[0.1])
    flat = [Sample(float(i), 10, 5, 2, 0) for i in range(90)]
    grows = [replace(each, **{which: 10 + i // 10}) for i, each in enumerate(flat)]
    filling = [replace(each, **{which: min(i, 10)}) for i, each in enumerate(flat)]
    assert report(QUIET, fine, [*flat, IDLE], 100) == 0
    assert report(QUIET, fine, [*filling, IDLE], 100) == 0, "caches fill"
    assert report(QUIET, fine, [*grows, IDLE], 100) == 1


def test_flags_of_the_server_stand_behind_two_dashes() -> None:
    args, flags = _parse(["m", "--clients", "3", "--", "--ram", "1GB"])
    assert (args.model, args.clients, flags) == ("m", 3, ["--ram", "1GB"])
    assert _parse(["m"])[1] == []
