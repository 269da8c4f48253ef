"""What the engines over PyTorch and transformers have in common: greedy decoding with a KV cache, timed from outside.

Runs where pipo is not installed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch

from bench.engines.timed_engine import PROMPT_TOKENS, TimedEngine
from bench.messages import FirstToken, FolderSetup, Passes, Started
from bench.prompts import random_prompt


class TorchEngine(TimedEngine[FolderSetup]):
    """One transformers model, on the CPU, whose weights the peer brings to memory when they are needed."""

    def __init__(self, name: str) -> None:
        super().__init__(name, FolderSetup)
        self._model: Any = None

    def close(self) -> None:
        self._model = None

    @abstractmethod
    def _load(self, setup: FolderSetup) -> Any:
        """A model that can be called like those of transformers."""

    @abstractmethod
    def _version(self) -> str: ...

    def _start(self, setup: FolderSetup) -> Started:
        torch.set_num_threads(setup.threads)
        begin = perf_counter()
        self._model = self._load(setup)
        self._vocab_size = setup.vocab_size
        return Started(perf_counter() - begin, f"{self._version()}, torch {torch.__version__}")

    def _decode(self, num_passes: int, prompt: list[int]) -> Passes:
        return self._decode_batch(1, num_passes)

    def _decode_batch(self, num_sequences: int, num_passes: int) -> Passes:
        prompts = [random_prompt(PROMPT_TOKENS, seed, self._vocab_size) for seed in range(num_sequences)]
        tokens = self._tokens(prompts)
        next(tokens)
        seconds = []
        for _ in range(num_passes):
            begin = perf_counter()
            next(tokens)
            seconds.append(perf_counter() - begin)
        return Passes(num_passes, tuple(seconds))

    def _prefill(self, num_tokens: int, seed: int) -> FirstToken:
        begin = perf_counter()
        next(self._tokens([random_prompt(num_tokens, seed, self._vocab_size)]))
        return FirstToken(num_tokens, perf_counter() - begin)

    def _greedy(self, num_tokens: int) -> tuple[int, ...]:
        tokens = self._tokens([random_prompt(PROMPT_TOKENS, 0, self._vocab_size)])
        return tuple(next(tokens)[0] for _ in range(num_tokens))

    def _tokens(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        """The next token of each sequence, one pass at a time. Prompts of one length."""
        inputs, cache = torch.tensor(prompts), None
        while True:
            with torch.inference_mode():
                answer = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = answer.past_key_values
            inputs = answer.logits[:, -1].argmax(-1, keepdim=True)
            yield inputs[:, 0].tolist()
