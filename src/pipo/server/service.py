"""What all routes share: the engine once it is there, the text side, counters, and the end of it all."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Protocol, cast

from fastapi import Request

from pipo import __version__
from pipo.base.errors import PipoError
from pipo.server.errors import ApiError, Fault, engine_gone, invalid, stopping
from pipo.server.metrics import Metrics
from pipo.server.prompts import Prompts
from pipo.server.settings import BODIES_READ, ServerSettings
from pipo.serving.contract import EngineClient, EngineInfo, ServedEngine

LOADING_BODY_TOKENS = 8192  # before the context is known


class Stoppable(Protocol):
    def fail(self, error: ApiError) -> None: ...


class Service:
    """Threads: the event loop's; `progress` may be written from any."""

    def __init__(self, settings: ServerSettings, prompts: Prompts) -> None:
        from pipo.server.body import BodyRoom

        self.settings = settings
        self.prompts = prompts
        self.metrics = Metrics()
        self.body_room = BodyRoom()
        self.text_turn = asyncio.Semaphore(1)
        self.progress: tuple[str, float] = ("starting", 0.0)
        self.started_s = time.time()
        self.page: dict[str, object] = {}
        self._client: ServedEngine | None = None
        self._answers: set[Stoppable] = set()
        self._end: ApiError | None = None  # what everybody is told from then on

    def ready(self, client: ServedEngine) -> None:
        self._client = client
        self.metrics.limit_bytes = client.info.limit_bytes

    @property
    def is_ready(self) -> bool:
        return self._client is not None and self._end is None

    @property
    def engine(self) -> EngineClient:
        """Raises ApiError while it is loaded, and once the server is to end."""
        if self._end is not None:
            raise self._end
        if self._client is None:
            step, fraction = self.progress
            raise ApiError(Fault.UNAVAILABLE, f"loading the model: {step}, {fraction:.0%}", code="loading")
        return self._client

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def max_body_bytes(self) -> int:
        context = LOADING_BODY_TOKENS if self._client is None else self._client.info.context_tokens
        return self.settings.limits.body_bytes(context)

    @property
    def most_bodies_bytes(self) -> int:
        return BODIES_READ * self.max_body_bytes

    def fingerprint(self) -> str:
        """Changes with what may change an answer: version, model, plan."""
        info = self.info
        text = f"{__version__} {info.model} {info.context_tokens} {sorted(info.plan.items(), key=str)!r}"
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def adapters_of(self, model: str | None) -> str | None:
        """What the name in a request chooses: an adapter, or the model with all that was loaded.

        Raises ApiError for a name that is neither.
        """
        if model is None or model == self.settings.name or model == self.info.model:
            return None
        if model in self.info.adapters:
            return model
        raise ApiError(
            Fault.NOT_FOUND,
            f"there is no model {model!r:.80}; this server has {self.settings.name!r:.80}",
            param="model",
            code="model_not_found",
        )

    def check_lengths(self, num_prompt: int, max_tokens: int | None) -> int:
        """Tokens that an answer may have. Raises ApiError: nothing is cut."""
        limits, context = self.settings.limits, self.info.context_tokens
        if limits.max_prompt_tokens is not None and num_prompt > limits.max_prompt_tokens:
            raise invalid(
                f"the prompt has {num_prompt} tokens, this server takes {limits.max_prompt_tokens}",
                code="context_length_exceeded",
            )
        if max_tokens is not None and limits.max_tokens is not None and max_tokens > limits.max_tokens:
            raise invalid(f"max_tokens is {max_tokens}, this server gives {limits.max_tokens} at most", "max_tokens")
        room = context - num_prompt
        if room < (max_tokens or 1):
            answer = f"an answer of {max_tokens}" if max_tokens else "an answer"
            raise invalid(
                f"a prompt of {num_prompt} tokens and {answer} do not fit the context of {context} tokens",
                "messages" if max_tokens is None else "max_tokens",
                "context_length_exceeded",
            )
        return max_tokens or min(room, limits.max_tokens or room)

    def begin(self, answers: Stoppable) -> Callable[[], None]:
        """They are told when the server ends. Returns what to call when they are over."""
        if self._end is not None:
            raise self._end
        self._answers.add(answers)
        return lambda: self._answers.discard(answers)

    def stop(self, died: PipoError | None = None) -> None:
        """Tell everybody, also what the engine has `died` of. What is asked from now on is refused."""
        if self._end is None:
            self._end = stopping() if died is None else engine_gone(died)
        for answers in list(self._answers):
            answers.fail(self._end)

    async def close(self) -> None:
        self.stop()
        if self._client is not None:
            await self._client.close()

    async def kill(self) -> None:
        """The engine, where `close` takes too long."""
        if self._client is not None:
            await self._client.kill()


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)
