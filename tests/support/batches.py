"""Batch jobs in this process: an engine that answers at once, and tables to answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipo.base.config import EngineConfig
from pipo.base.errors import PipoError, UsageError
from pipo.generation.answer import Piece
from pipo.generation.request import FinishReason, GenerationRequest, Sampled, SamplingParams, Usage
from pipo.jobs.answers import Answer
from pipo.jobs.batch import Batch, BatchSettings
from pipo.jobs.engine_plan import EngineSpec
from pipo.jobs.prompts import PromptSettings
from pipo.serving.contract import EngineClient, EngineInfo, EngineStats, Summary

GREEDY = SamplingParams(temperature=0, max_tokens=6)


class EchoEngine:
    """Says how its prompt ends. Keeps what it was asked, and fails or is full on demand."""

    def __init__(self, *, failures: dict[int, PipoError] | None = None, num_sequences: int = 4) -> None:
        self.asked: list[GenerationRequest] = []
        self.most_open = 0
        self._failures = failures or {}
        self._num_sequences = num_sequences
        self._num_open = 0

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("echo", 256, self._num_sequences, 1 << 30)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Piece | Summary]:
        failure = self._failures.pop(len(self.asked), None)
        if failure is not None:
            self.asked.append(request)
            raise failure
        self.asked.append(request)
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)
        try:
            await asyncio.sleep(0.001 * (len(request.prompt) % 5))  # they end in another order than they begin
            yield Piece(Sampled(request.prompt[-1]), f"{len(request.prompt)}:")
            yield Piece(Sampled(request.prompt[-1]), f"{request.prompt[-1]}", FinishReason.STOP)
            yield Summary(Usage(len(request.prompt), 2), 0.0, 0.0, 0.0)
        finally:
            self._num_open -= 1

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        raise UsageError("a job embeds nothing")

    async def stats(self) -> EngineStats:
        return EngineStats(num_running=self._num_open)

    async def close(self) -> None: ...


def settings_of(model: Path, table: Path, output: Path, **changes: Any) -> BatchSettings:
    """Raw greedy prompts; `changes` are BatchSettings' fields."""
    usual: dict[str, Any] = {
        "config": EngineConfig(ram="2GB", context_tokens=64),
        "prompts": PromptSettings(GREEDY, is_raw=True),
        "num_sequences": 4,
    }
    return BatchSettings(model, table, output, **(usual | changes))


def answer_all(job: Batch, engine: EngineClient) -> None:
    """Without the output."""

    async def start(spec: EngineSpec) -> EngineClient:
        return engine

    asyncio.run(job.run(start, lambda client: None, lambda tally, stats, anonymous_bytes: None))


def done_answer(row: int, text: str = "yes") -> Answer:
    return Answer(row, text, "stop", 3, 1)


def write_tables(folder: Path) -> None:
    """Those that the documents name."""
    (folder / "reviews.csv").write_text("id,review\n1,Lovely and quiet.\n2,It leaks.\n3,Lovely and quiet.\n")
    schema = {"type": "object", "properties": {"verdict": {"enum": ["good", "bad"]}}, "required": ["verdict"]}
    (folder / "verdict.json").write_text(json.dumps(schema))
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
    request = {"custom_id": "first", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
    questions = {"question": ["What is the tide?", "What is the moon?"], "id": [1, 2]}
    pq.write_table(pa.table(questions), folder / "questions.parquet")
    (folder / "letters").mkdir()
    (folder / "letters" / "monday.txt").write_text("Dear Anna, it rains and I read.")
