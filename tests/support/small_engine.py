"""Small engines and short questions: what every test of a failing engine starts and asks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipo.engine import Engine
from pipo.generation.request import SamplingParams
from pipo.transfer.files import Preadv
from tests.support.engines import start_engine

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPT = list(range(299, 320))  # of both vocabularies
SHORT = PROMPT[:3]  # one chunk: its pass reads every unit
SETTINGS: dict[str, Any] = {"prefill_chunk": 8, "context_tokens": 256}


def start(path: Path, ram_bytes: int, preadv: Preadv | None = None, **settings: Any) -> Engine:
    return start_engine(path, ram_bytes=ram_bytes, preadv=preadv, **{**SETTINGS, **settings})


def answer(engine: Engine, prompt: Sequence[int] = PROMPT) -> tuple[int, ...]:
    return engine.complete(prompt, GREEDY).token_ids
