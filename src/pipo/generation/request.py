"""What a caller asks of a generation, and what comes back: parameters, tokens, the finished answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from pipo.base.errors import UsageError

MAX_BIASED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end. The defaults are llama.cpp's; penalties are off.

    Raises: UsageError naming the field.
    """

    max_tokens: int | None = None  # None: until the model ends or the context is full
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 40  # 0 or -1 keeps all
    top_p: float = 0.95  # 1 keeps all
    min_p: float = 0.05  # 0 keeps all
    repeat_penalty: float = 1.0  # 1 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64  # tokens the penalties look back, prompt included; -1 is all of them
    seed: int | None = None  # None draws one
    stop: Sequence[str] = ()  # kept as a tuple
    logprobs: int | None = None  # alternatives to list with each token; 0 is the token alone
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens; -inf forbids

    def __post_init__(self) -> None:
        _check_bias(self.logit_bias)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0)
        _check_int("top_k", self.top_k, -1)
        _check_int("repeat_last_n", self.repeat_last_n, -1)
        _check_number("temperature", self.temperature, 0.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -math.inf)
        _check_number("frequency_penalty", self.frequency_penalty, -math.inf)
        _check_number("repeat_penalty", self.repeat_penalty, 0.0)
        if self.repeat_penalty == 0:
            raise UsageError("repeat_penalty must be more than 0", hint="1 is off")
        if not isinstance(self.stop, list | tuple):
            raise UsageError(f"stop must be strings in a list or tuple, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        _check_stop(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        is_off = self.repeat_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return not is_off and self.repeat_last_n != 0


class ConstraintKind(Enum):
    """How a constraint is written. Source: llguidance."""

    JSON_OBJECT = "json_object"  # any JSON object; the text is empty
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"  # Lark


@dataclass(frozen=True, slots=True)
class ConstraintSpec:
    """What an answer must look like, as text, so that it can go to another process.

    Where it begins with something free, a model's thinking, `after` is the text that ends that.
    """

    kind: ConstraintKind
    text: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence that is to be answered. `adapters` is what AdapterSet is: None for all that are loaded. `shown` are
    control tokens that are part of the answer's text, as the markers of tool calls are. `scores_prompt` asks for
    log-probabilities of the prompt's tokens, too, with as many alternatives as `params.logprobs`.
    """

    prompt: Sequence[int]
    params: SamplingParams
    adapters: str | Mapping[str, float] | None = None
    constraint: ConstraintSpec | None = None
    shown: frozenset[int] = frozenset()
    scores_prompt: bool = False

    def __post_init__(self) -> None:
        if self.scores_prompt and self.params.logprobs is None:
            raise UsageError("a prompt is scored with log-probabilities: set logprobs")


def copies_of(request: GenerationRequest, num_copies: int) -> list[GenerationRequest]:
    """Several answers to one prompt, each drawn with a seed of its own: the request's and the numbers after it, where
    it has one. Asked for together, they share the prompt: it is computed once where keys and values can be copied.
    """
    seed = request.params.seed
    seeds = [None if seed is None else seed + i for i in range(num_copies)]
    return [replace(request, params=replace(request.params, seed=each)) for each in seeds]


class FinishReason(Enum):
    """Why a generation ended. The values are the HTTP API's."""

    STOP = "stop"  # the model's end token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"


LOGPROB_BYTES = 160  # a pair of token id and number as Python keeps it; measured 130


def logprobs_bytes(num_tokens: int, num_alternatives: int) -> int:
    """Memory that the log-probabilities of an answer take while it is kept."""
    return num_tokens * (num_alternatives + 1) * LOGPROB_BYTES


TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token. Its log-probability, and the most likely tokens' (best first), where they were asked for.

    Both are of the raw distribution: the model's logits before penalties, filters and temperature.
    """

    token_id: int
    logprob: float | None = None
    top: TopLogprobs = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted as the HTTP API counts them; cached ones are part of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Summary:
    """The last thing heard of a request that was answered."""

    usage: Usage
    queued_s: float
    ttft_s: float  # from submission to the first token
    decode_s: float  # from the first token to the last


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer. `text` ends before the stop string, if one was hit; `tokens` are all that were chosen."""

    text: str
    tokens: tuple[Sampled, ...]
    finish_reason: FinishReason
    usage: Usage

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(sampled.token_id for sampled in self.tokens)


def _check_int(field: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{field} must be a whole number, not {value!r}")
    if value < low:
        raise UsageError(f"{field} must be {low} or more, not {value}")


def _check_number(field: str, value: object, low: float, high: float = math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{field} must be a number, not {value!r}")
    if not low <= value <= high:
        wanted = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise UsageError(f"{field} must be {wanted}, not {value:g}")


def _check_bias(bias: object) -> None:
    """-inf forbids a token; whether the model has it is known later."""
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias must be numbers by token id, not {bias!r:.80}")
    if len(bias) > MAX_BIASED_TOKENS:
        raise UsageError(f"logit_bias has {len(bias)} tokens, at most {MAX_BIASED_TOKENS} can be")
    for token_id, value in bias.items():
        _check_int("a token id of logit_bias", token_id, 0)
        if value != -math.inf:
            _check_number(f"logit_bias of token {token_id}", value, -math.inf)


def _check_stop(stop: Sequence[object]) -> None:
    if not all(isinstance(text, str) for text in stop):
        raise UsageError(f"stop must be strings, not {stop!r}")
    if "" in stop:
        raise UsageError("stop must not hold an empty string", hint="it would end every answer before it begins")
