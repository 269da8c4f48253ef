"""serving: an engine in a process of its own answers as one in this process, and ends with whoever ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipo.base.errors import (
    Cancelled,
    ContextOverflow,
    EngineDied,
    ModelNotFound,
    OverBudget,
    UsageError,
)
from pipo.base.units import MIB
from pipo.generation.request import ConstraintKind, ConstraintSpec, GenerationRequest, SamplingParams, Summary
from pipo.serving.client import ProcessEngine, open_engine
from pipo.serving.contract import EngineClient
from tests.support.engine_process import GREEDY, LONG, answer, engine_of, exists, run, setup_of
from tests.support.engines import start_engine

PROMPTS = [[1, 2, 3], list(range(300, 340)), [504, 3575, 282, 4649, 314], list(range(300, 330)), [7] * 20]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured once, for these tests alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "engine_process_cache"))


def test_answers_are_those_of_an_engine_here(smollm2_path: Path) -> None:
    async def main() -> list[tuple[list[int], Summary]]:
        async with engine_of(setup_of(smollm2_path)) as engine:
            client: EngineClient = engine
            assert (client.info.context_tokens, client.info.num_sequences) == (256, 4)
            assert client.info.plan["plan"]["context_tokens"] == 256
            found = await asyncio.gather(*(answer(engine, prompt) for prompt in PROMPTS))
            stats = await client.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert stats.completion_tokens == len(PROMPTS) * 12
            assert stats.prompt_tokens == sum(map(len, PROMPTS)) and stats.num_passes > 0
            assert {"job", "queue"} <= stats.ledger.keys() and sum(stats.ledger.values()) <= stats.limit_bytes
            return found

    found = run(main())
    with start_engine(smollm2_path, context_tokens=256) as engine:
        want = [engine.complete(prompt, GREEDY).token_ids for prompt in PROMPTS]
    assert [tuple(tokens) for tokens, _ in found] == want
    for (_, summary), prompt in zip(found, PROMPTS, strict=True):
        assert (summary.usage.prompt_tokens, summary.usage.completion_tokens) == (len(prompt), 12)
        assert 0 <= summary.queued_s <= summary.ttft_s and summary.decode_s > 0


def test_errors_are_those_of_an_engine_here(smollm2_path: Path, tmp_path: Path) -> None:
    async def refused() -> None:
        with pytest.raises(OverBudget, match=r"job 600\.0 MiB") as caught:
            await open_engine(setup_of(smollm2_path, ram_bytes=620 * MIB))
        assert caught.value.smallest_bytes and "the smallest --ram that works" in (caught.value.hint or "")
        with pytest.raises(ModelNotFound):
            await open_engine(setup_of(tmp_path / "nothing.gguf"))
        with pytest.raises(UsageError, match="context of 1000000"):
            await open_engine(setup_of(smollm2_path, context_tokens=1_000_000))
        async with engine_of(setup_of(smollm2_path)) as engine:
            with pytest.raises(ContextOverflow, match="300 tokens"):
                await answer(engine, [5] * 300)
            with pytest.raises(UsageError, match="there is no adapter 'style'"):
                async for _ in engine.stream(GenerationRequest([1], GREEDY, adapters="style")):
                    pass
            assert len((await answer(engine, PROMPTS[0]))[0]) == 12, "the others go on"

    run(refused())


def test_closing_an_iterator_cancels_its_request(smollm2_path: Path) -> None:
    async def main() -> None:
        async with engine_of(setup_of(smollm2_path, num_sequences=1, context_tokens=4096)) as engine:
            want, _ = await answer(engine, PROMPTS[1])
            async with aclosing(engine.stream(GenerationRequest([5] * 9, LONG))) as pieces:
                async for _ in pieces:
                    break
            found, _ = await answer(engine, PROMPTS[1])
            assert found == want, "the only sequence is free again"
            task = asyncio.ensure_future(answer(engine, [5] * 9, LONG))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            found, summary = await answer(engine, PROMPTS[1])
            assert found == want and summary.queued_s < 1
            stats = await engine.stats()
            assert stats.completion_tokens < 4000

    run(main())


async def open_requests(engine: ProcessEngine) -> list[asyncio.Task[object]]:
    """Three that are being answered, two that wait."""
    tasks: list[asyncio.Task[object]] = [
        asyncio.ensure_future(answer(engine, prompt, replace(LONG, max_tokens=3000))) for prompt in PROMPTS
    ]
    while (await engine.stats()).completion_tokens < 6:
        await asyncio.sleep(0.01)
    return tasks


def test_a_killed_engine_ends_every_request_and_says_so(smollm2_path: Path) -> None:
    async def main() -> None:
        engine = await open_engine(setup_of(smollm2_path, num_sequences=3, context_tokens=4096))
        tasks = await open_requests(engine)
        os.kill(engine.process_id, signal.SIGKILL)
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, EngineDied) and "SIGKILL" in str(found)
        with pytest.raises(EngineDied):
            await engine.stats()
        with pytest.raises(EngineDied):
            await answer(engine, PROMPTS[0])
        await engine.close()
        await engine.close()
        assert not exists(engine.process_id), "no zombie"

    run(main())


def test_closing_ends_what_is_open(smollm2_path: Path) -> None:
    async def main() -> None:
        engine = await open_engine(setup_of(smollm2_path, num_sequences=3, context_tokens=4096))
        tasks = await open_requests(engine)
        begin = time.monotonic()
        await engine.close()
        assert time.monotonic() - begin < 5, "it ended by itself"
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, Cancelled)
        with pytest.raises(Cancelled):
            await engine.stats()
        assert not exists(engine.process_id)

    run(main())


def test_who_stops_waiting_for_the_start_leaves_no_process(smollm2_path: Path) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(open_engine(setup_of(smollm2_path)))
        await asyncio.sleep(0.2)
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
        assert "pipo.serving.process" in children.stdout
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
        assert "pipo.serving.process" not in children.stdout

    run(main())


PARENT = """
import asyncio, os, sys, time
from pathlib import Path
from pipo.serving.client import open_engine
from tests.support.engine_process import LONG, answer, setup_of

async def main():
    engine = await open_engine(setup_of(Path(sys.argv[1]), context_tokens=4096))
    task = asyncio.ensure_future(answer(engine, [1, 2, 3], LONG))
    await asyncio.sleep(0.3)
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print(engine.process_id, flush=True)
    await task

asyncio.run(main())
"""


@pytest.mark.parametrize("sibling", ["", "fork"])
def test_an_engine_ends_with_a_killed_parent(smollm2_path: Path, sibling: str) -> None:
    """Also where a child of the parent lives on, which holds its end of the pipe open."""
    arguments = [sys.executable, "-c", PARENT, str(smollm2_path), *([sibling] if sibling else [])]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        process_id = int(parent.stdout.readline())
        assert exists(process_id)
        parent.kill()
        parent.wait()
        for _ in range(200):
            if not exists(process_id):
                break
            time.sleep(0.1)
        is_there = exists(process_id)
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert not is_there


def test_without_constraints_they_are_refused(smollm2_path: Path) -> None:
    async def main() -> None:
        async with engine_of(setup_of(smollm2_path)) as engine:
            request = GenerationRequest([1], SamplingParams(), constraint=ConstraintSpec(ConstraintKind.JSON_OBJECT))
            with pytest.raises(UsageError):
                async for _ in engine.stream(request):
                    pass

    run(main())


BUDGET = """
import asyncio, json, sys
from pathlib import Path
from pipo.base.config import EngineConfig
from pipo.hardware.memory import process_memory
from pipo.model_file import ModelFile
from pipo.serving.allowance import asking_bytes
from pipo.serving.client import open_engine
from pipo.serving.wire import EngineSetup
from pipo.generation.request import GenerationRequest, SamplingParams

async def main():
    path, ram = Path(sys.argv[1]), int(sys.argv[2])
    model = ModelFile(path, ram)
    config = EngineConfig(ram=str(ram), context_tokens=512, num_sequences=2)
    setup = EngineSetup(path, config, "job", asking_bytes())
    engine = await open_engine(setup)
    async def one(i):
        prompt = model.encode("The tide rises because " * 20 + str(i))
        async for what in engine.stream(GenerationRequest(prompt, SamplingParams(max_tokens=40, temperature=0))):
            pass
        return what
    await asyncio.gather(*(one(i) for i in range(6)))
    stats = await engine.stats()
    mine = process_memory().anonymous_bytes
    await engine.close()
    print(json.dumps({"peak": stats.peak_bytes, "mine": mine, "allowed": setup.asking_bytes,
                      "streamed": engine.info.plan["plan"]["streamed_bytes_per_pass"], "ledger": stats.ledger}))

asyncio.run(main())
"""


@pytest.mark.parametrize("ram_mib", [180, 260])
def test_both_processes_stay_under_the_budget(smollm2_path: Path, ram_mib: int) -> None:
    arguments = [sys.executable, "-c", BUDGET, str(smollm2_path), str(ram_mib * MIB)]
    child = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["peak"] <= ram_mib * MIB
    assert found["mine"] <= found["allowed"] == found["ledger"]["job"]
    assert sum(found["ledger"].values()) <= ram_mib * MIB


@pytest.mark.parametrize(("ram_mib", "num_sequences"), [(2000, 8), (1000, 2), (800, 1)])
def test_an_engine_that_may_choose_answers_as_many_as_have_context(
    smollm2_path: Path, ram_mib: int, num_sequences: int
) -> None:
    setup = replace(setup_of(smollm2_path, ram_mib * MIB, context_tokens=4096), most_sequences=8)

    async def main() -> None:
        async with engine_of(setup) as engine:
            assert (engine.info.num_sequences, engine.info.context_tokens) == (num_sequences, 4096)
        if num_sequences < 8:
            twice = replace(setup.config, num_sequences=2 * num_sequences)
            with pytest.raises(OverBudget):
                await open_engine(replace(setup, config=twice, most_sequences=None))

    run(main())
