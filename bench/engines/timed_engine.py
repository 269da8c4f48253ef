"""What every engine is asked: start once, then decode and prefill, as often as wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from bench.messages import (
    Decode,
    DecodeBatch,
    FirstToken,
    FolderSetup,
    Greedy,
    LlamaSetup,
    Passes,
    PipoSetup,
    Prefill,
    Request,
    Start,
    Started,
)
from bench.prompts import random_prompt

PROMPT_TOKENS = 8  # before the decode passes
Setup = TypeVar("Setup", bound=PipoSetup | LlamaSetup | FolderSetup)


class TimedEngine(ABC, Generic[Setup]):
    """One engine in a child process, with the setup that it takes. `name` is what its refusals call it."""

    def __init__(self, name: str, setup: type[Setup]) -> None:
        self._name = name
        self._setup = setup
        self._vocab_size = 0

    def answer(self, request: Request[Any]) -> object:
        """Raises TypeError for a request it does not serve."""
        match request:
            case Start():
                assert isinstance(request.setup, self._setup)
                return self._start(request.setup)
            case Decode():
                return self._decode(request.num_passes, self._prompt(request.first_token))
            case Greedy():
                return self._greedy(request.num_tokens)
            case DecodeBatch():
                return self._decode_batch(request.num_sequences, request.num_passes)
            case Prefill():
                return self._prefill(request.num_tokens, request.seed)
        raise TypeError(f"{self._name} does not serve {request}")

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _start(self, setup: Setup) -> Started: ...

    def _prompt(self, first_token: int | None) -> list[int]:
        if first_token is None:
            return random_prompt(PROMPT_TOKENS, 0, self._vocab_size)
        return list(range(first_token, first_token + PROMPT_TOKENS))

    @abstractmethod
    def _decode(self, num_passes: int, prompt: list[int]) -> Passes: ...

    @abstractmethod
    def _prefill(self, num_tokens: int, seed: int) -> FirstToken: ...

    @abstractmethod
    def _greedy(self, num_tokens: int) -> tuple[int, ...]: ...

    def _decode_batch(self, num_sequences: int, num_passes: int) -> Passes:
        """Of an engine that has no batches."""
        raise TypeError(f"{self._name} has no batches of sequences")
