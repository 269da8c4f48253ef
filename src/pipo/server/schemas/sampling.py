"""Fields that OpenAI's routes share: how tokens are chosen, and when an answer ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, field_validator

from pipo.generation.request import SamplingParams
from pipo.server.body import Body
from pipo.server.errors import invalid

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
MAX_LOGPROBS = 20
_MAX_BIASES = 4096
_BY_THE_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty",
    "repeat_last_n", "seed", "ignore_eos",
)  # fmt: skip

Stop = Annotated[str, Field(max_length=1024)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Penalty = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    include_usage: bool = False


class SamplingBody(Body):
    """What is null or left out is as `pipo run` has it."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    logit_bias: Annotated[dict[str, Penalty], Field(max_length=_MAX_BIASES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None  # whose request it is changes nothing here

    @field_validator("logit_bias")
    @classmethod
    def _check_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((key for key in value or {} if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r:.80} is no token id")
        return value

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Of a stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream_options(self) -> None:
        """Raises ApiError for options of a stream that is none."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is for streams: set stream too", "stream_options")

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Raises UsageError."""
        given = {name: getattr(self, name) for name in _BY_THE_SAME_NAME}
        wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        bias = {int(key): value for key, value in (self.logit_bias or {}).items()}
        params = SamplingParams(max_tokens=max_tokens, stop=stop, logprobs=logprobs, logit_bias=bias)
        return replace(params, **wanted)
