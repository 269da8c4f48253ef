"""pipo.AsyncLLM: answers for a program with an event loop, the same as LLM's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

import pipo
from pipo.base.errors import Cancelled, ContextOverflow, UsageError
from tests.support.engine_process import LONG, run

GREEDY = pipo.SamplingParams(max_tokens=6, temperature=0)
PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time", "Water is made of", "My name is"]


@asynccontextmanager
async def llm_of(path: Path, **settings: int) -> AsyncIterator[pipo.AsyncLLM]:
    async with pipo.AsyncLLM(path, ram=8_000_000_000, **{"context_tokens": 256, "num_sequences": 2, **settings}) as llm:
        yield llm


def test_many_prompts_at_once_and_one_piece_by_piece(smollm2_path: Path) -> None:
    with pipo.LLM(smollm2_path, ram=8_000_000_000, context_tokens=256) as alone:
        want = [answer.text for answer in alone.generate(PROMPTS, GREEDY)]
        talk = [[{"role": "user", "content": "Name a colour."}]]
        want_talk = alone.chat(talk, GREEDY)[0].text

    async def main() -> None:
        async with llm_of(smollm2_path) as llm:
            answers, colour = await asyncio.gather(llm.generate(PROMPTS * 2, GREEDY), llm.chat(talk, GREEDY))
            assert [answer.text for answer in answers] == want * 2
            assert colour[0].text == want_talk
            pieces = [piece.text async for piece in llm.stream(PROMPTS[0], GREEDY)]
            assert "".join(pieces) == want[0] and len(pieces) > 1
            assert (await llm.generate(PROMPTS[1], GREEDY))[0].usage.completion_tokens == 6

    run(main())


def test_one_failure_fails_the_call_and_nothing_else(smollm2_path: Path) -> None:
    async def main() -> None:
        async with llm_of(smollm2_path) as llm:
            with pytest.raises(ContextOverflow):
                await llm.generate([PROMPTS[0], "word " * 400, PROMPTS[1]], GREEDY)
            with pytest.raises(UsageError, match="no adapter"):
                await llm.generate(PROMPTS[0], GREEDY, adapters="style")
            assert (await llm.generate(PROMPTS[0], GREEDY))[0].text

    run(main())


def test_leaving_early_frees_the_sequence(smollm2_path: Path) -> None:
    async def main() -> None:
        async with llm_of(smollm2_path, num_sequences=1, context_tokens=4096) as llm:
            async with aclosing(llm.stream(PROMPTS[0], LONG)) as pieces:
                async for _ in pieces:
                    break
            assert (await llm.generate(PROMPTS[0], GREEDY))[0].text

    run(main())


def test_closing_ends_what_is_open(smollm2_path: Path) -> None:
    async def main() -> None:
        async with llm_of(smollm2_path, context_tokens=4096) as llm:
            task = asyncio.ensure_future(llm.generate(PROMPTS, LONG))
            await asyncio.sleep(0.2)
        with pytest.raises(Cancelled):
            await task
        with pytest.raises(Cancelled):
            await llm.generate(PROMPTS, GREEDY)
        await llm.close()

    run(main())
