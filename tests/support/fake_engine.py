"""An engine behind the server's contract that computes by arithmetic, slowly or wrongly where a test wants it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from pipo.base.errors import EngineBusy, PipoError
from pipo.generation.answer import Answer, Piece
from pipo.generation.request import GenerationRequest, Sampled, Usage
from pipo.serving.contract import EngineInfo, EngineStats, Summary
from pipo.text.contract import ModelTokenizer

PEAK = 30.0  # of the logit that is to be chosen: the others have no chance


def answer_text(prompt: Sequence[int]) -> str:
    """What the engine says to a prompt."""
    return f"You sent {len(prompt)} tokens, their sum is {sum(prompt)}."


def _scored(prompt: Sequence[int]) -> tuple[Sampled, ...]:
    """Each token is as likely as it is late."""
    return Sampled(prompt[0]), *(Sampled(each, -float(i), ((each, -float(i)),)) for i, each in enumerate(prompt) if i)


class FakeEngine:
    """A ServedEngine. `delay_s` lies before each token; the `fail_at`th token is `error` instead.
    One that `is_stuck` does not close until it is killed.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        context_tokens: int = 512,
        delay_s: float = 0.0,
        error: Exception | None = None,
        fail_at: int = 0,
        text: str | None = None,
        max_running: int = 1000,
        adapters: tuple[str, ...] = (),
        is_stuck: bool = False,
    ) -> None:
        self.info = EngineInfo("fake", context_tokens, 4, 10**9, adapters, {"plan": {"weight_bytes": 1000}})
        self.requests: list[GenerationRequest] = []
        self.num_running = 0
        self.num_cancelled = 0
        self.is_closing = self.is_closed = self.is_killed = False
        self._death: asyncio.Future[PipoError] | None = None  # once somebody waits for it
        self._is_over = asyncio.Event()
        if not is_stuck:
            self._is_over.set()
        self._tokenizer = tokenizer
        self._delay_s, self._error, self._fail_at = delay_s, error, fail_at
        self._text, self._max_running = text, max_running
        self._num_tokens = 0

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece | Summary, None]:
        if self.num_running >= self._max_running:
            raise EngineBusy(f"{self.num_running} requests wait already")
        self.requests.append(request)
        self.num_running += 1
        is_over = False
        begin = time.monotonic()
        try:
            num_tokens = 0
            async for piece in self._pieces(request):
                num_tokens += piece.token is not None
                yield piece
            is_over = True
            usage = Usage(len(request.prompt), num_tokens, len(request.prompt) // 2)
            self._num_tokens += num_tokens
            yield Summary(usage, 0.0, time.monotonic() - begin, 0.01 * num_tokens)
        finally:
            self.num_running -= 1
            self.num_cancelled += not is_over

    async def _pieces(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        tokenizer, prompt = self._tokenizer, list(request.prompt)
        text = answer_text(prompt) if self._text is None else self._text
        script = tokenizer.encode(text, add_special=False, parse_special=False)
        most = request.params.max_tokens or self.info.context_tokens
        answer = Answer(request.params, most, tokenizer.end_ids, tokenizer.detokenizer(prompt, request.shown))
        if request.scores_prompt:
            yield Piece(None, "", scored=_scored(prompt))
        for i, token_id in enumerate([*script, min(tokenizer.end_ids)]):
            if self._error is not None and i == self._fail_at:
                raise self._error
            await asyncio.sleep(self._delay_s)
            logits = np.zeros(tokenizer.vocab_size, np.float32)
            logits[token_id] = PEAK
            piece = answer.take(logits, prompt)
            yield piece
            if piece.finish is not None:
                return

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        self.num_running += 1
        try:
            await asyncio.sleep(self._delay_s)
        finally:
            self.num_running -= 1
        return [0.6, 0.8, float(len(prompt))]

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            completion_tokens=self._num_tokens,
            bytes_read=4096,
            stall_s={"drive": 1.5},
            ledger={"weights": 900, "slots": 100},
            limit_bytes=self.info.limit_bytes,
        )

    async def ended(self) -> PipoError:
        self._death = asyncio.get_running_loop().create_future()
        return await self._death

    def die(self, error: PipoError) -> None:
        """Threads: the event loop's."""
        assert self._death is not None
        self._death.set_result(error)

    async def close(self) -> None:
        self.is_closing = True
        await self._is_over.wait()
        self.is_closed = True

    async def kill(self) -> None:
        self.is_killed = True
        self._is_over.set()
