"""Requests that wait for a slot: first come, first served, and no more of them than was planned for."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipo.base.errors import EngineBusy
from pipo.generation.events import RequestId
from pipo.generation.request import GenerationRequest
from pipo.pipeline.adapters import Weights

PROMPT_TOKEN_BYTES = 4  # while it waits
REQUEST_BYTES = 4096  # besides: parameters, stops, a constraint's text


@dataclass(frozen=True, slots=True)
class Waiting:
    """`request` is None where an embedding of the prompt is wanted."""

    request_id: RequestId
    prompt: array[int]
    max_tokens: int
    weights: Weights
    since_s: float
    request: GenerationRequest | None = None


@dataclass(frozen=True, slots=True)
class QueueSize:
    """How many may wait, and how many tokens their prompts may have together."""

    num_requests: int
    prompt_tokens: int

    @property
    def num_bytes(self) -> int:
        return self.num_requests * REQUEST_BYTES + self.prompt_tokens * PROMPT_TOKEN_BYTES

    def check(self, num_requests: int, prompt_tokens: int, more_tokens: int) -> None:
        """One more beside so many. Raises EngineBusy, but not where there is none."""
        if num_requests and (num_requests >= self.num_requests or prompt_tokens + more_tokens > self.prompt_tokens):
            raise EngineBusy(
                f"{num_requests} requests with {prompt_tokens} tokens of prompts are waiting, the most are "
                f"{self.num_requests} with {self.prompt_tokens}",
                hint="try again later",
            )

    def beside(self, num_sequences: int, context_tokens: int) -> QueueSize:
        """Of all that are open: those that wait and those that have a sequence."""
        return QueueSize(self.num_requests + num_sequences, self.prompt_tokens + num_sequences * context_tokens)


DEFAULT_QUEUE = QueueSize(num_requests=256, prompt_tokens=1 << 18)  # 2 MiB


class WaitingLine:
    """Threads: one."""

    def __init__(self, size: QueueSize) -> None:
        self._size = size
        self._waiting: deque[Waiting] = deque()
        self._prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, waiting: Waiting) -> None:
        """Raises EngineBusy. One that waits alone may be of any length that fits the context."""
        self._size.check(len(self), self._prompt_tokens, len(waiting.prompt))
        self._waiting.append(waiting)
        self._prompt_tokens += len(waiting.prompt)

    def take_first(self, may_begin: Callable[[Waiting], bool] = lambda waiting: True) -> Waiting | None:
        """Of those that may. None where there is none."""
        for i, waiting in enumerate(self._waiting):
            if may_begin(waiting):
                del self._waiting[i]
                self._prompt_tokens -= len(waiting.prompt)
                return waiting
        return None

    def take_out(self, request_ids: set[RequestId]) -> list[Waiting]:
        """Those of them that wait."""
        leaving = [each for each in self._waiting if each.request_id in request_ids]
        if leaving:
            self._waiting = deque(each for each in self._waiting if each.request_id not in request_ids)
            self._prompt_tokens -= sum(len(each.prompt) for each in leaving)
        return leaving


def compact(token_ids: Sequence[int]) -> array[int]:
    """As they wait. Values are checked before."""
    return array("i", token_ids)
