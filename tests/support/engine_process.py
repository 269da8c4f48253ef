"""Engines in processes of their own, for tests: what is asked of them, and what is said."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipo.base.config import EngineConfig
from pipo.base.units import MIB
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, SamplingParams, Summary
from pipo.serving.client import ProcessEngine, open_engine
from pipo.serving.wire import EngineSetup
from tests.support.transfers import deadline

T = TypeVar("T")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
ASKING_BYTES = 600 * MIB  # of a process that has imported what tests import


def setup_of(
    model: Path, ram_bytes: int = 2000 * MIB, asking_bytes: int = ASKING_BYTES, **settings: Any
) -> EngineSetup:
    config = EngineConfig(**{"ram": str(ram_bytes), "num_sequences": 4, "context_tokens": 256, **settings})
    return EngineSetup(model, config, "job", asking_bytes)


@asynccontextmanager
async def engine_of(setup: EngineSetup) -> AsyncIterator[ProcessEngine]:
    engine = await open_engine(setup)
    try:
        yield engine
    finally:
        await engine.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    """A hang ends the tests."""
    with deadline(120):
        return asyncio.run(main)


async def answer(
    engine: ProcessEngine, prompt: list[int], params: SamplingParams = GREEDY
) -> tuple[list[int], Summary]:
    tokens: list[int] = []
    async for what in engine.stream(GenerationRequest(prompt, params)):
        if isinstance(what, Piece):
            tokens += [what.token.token_id] if what.token is not None else []
        else:
            return tokens, what
    raise AssertionError("no summary")


def exists(process_id: int) -> bool:
    """A zombie does, too."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
