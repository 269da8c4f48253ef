"""llama.cpp as `llama-cpp-python` compiles it on this machine, through its C functions, in a child process."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from bench.engines.timed_engine import PROMPT_TOKENS, TimedEngine
from bench.messages import FirstToken, LlamaSetup, Passes, Started
from bench.prompts import random_prompt


class NativeEngine(TimedEngine[LlamaSetup]):
    """One model and one context, greedy, timed around `llama_decode` and the choice of a token."""

    def __init__(self) -> None:
        super().__init__("llama-cpp-python", LlamaSetup)
        self._llama: Any = None
        self._model: Any = None
        self._context: Any = None

    def close(self) -> None:
        if self._context:
            self._llama.llama_free(self._context)
            self._llama.llama_model_free(self._model)
            self._context = None

    def _start(self, setup: LlamaSetup) -> Started:
        self._llama = llama = _bindings(setup.site)
        llama.llama_log_set(_silence, None)
        llama.llama_backend_init()
        begin = perf_counter()
        params = llama.llama_model_default_params()
        if setup.mode == "mapped":
            params.load_mode, params.use_extra_bufts = llama.LLAMA_LOAD_MODE_MMAP, False
        self._model = _needed(llama.llama_model_load_from_file(str(setup.path).encode(), params), "the model")
        self._context = _needed(llama.llama_init_from_model(self._model, self._context_params(setup)), "a context")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        return Started(perf_counter() - begin, "llama-cpp-python")

    def _context_params(self, setup: LlamaSetup) -> Any:
        params = self._llama.llama_context_default_params()
        params.n_ctx = setup.context_tokens
        params.n_threads = params.n_threads_batch = setup.threads
        params.n_seq_max, params.kv_unified = setup.num_sequences, setup.num_sequences > 1
        return params

    def _decode(self, num_passes: int, prompt: list[int]) -> Passes:
        self._forget()
        token = self._pass(prompt)
        times = [perf_counter()]
        for _ in range(num_passes):
            token = self._pass([token])
            times.append(perf_counter())
        return Passes(num_passes, tuple(after - before for before, after in pairwise(times)))

    def _prefill(self, num_tokens: int, seed: int) -> FirstToken:
        self._forget()
        prompt = random_prompt(num_tokens, seed, self._vocab_size)
        begin = perf_counter()
        self._pass(prompt)
        return FirstToken(num_tokens, perf_counter() - begin)

    def _greedy(self, num_tokens: int) -> tuple[int, ...]:
        self._forget()
        token_ids = [self._pass(random_prompt(PROMPT_TOKENS, 0, self._vocab_size))]
        while len(token_ids) < num_tokens:
            token_ids.append(self._pass(token_ids[-1:]))
        return tuple(token_ids)

    def _decode_batch(self, num_sequences: int, num_passes: int) -> Passes:
        self._forget()
        prompts = [random_prompt(PROMPT_TOKENS, seed, self._vocab_size) for seed in range(num_sequences)]
        last = self._pass_of_many(prompts, 0)
        times = [perf_counter()]
        for idx in range(num_passes):
            last = self._pass_of_many([[token_id] for token_id in last], PROMPT_TOKENS + idx)
            times.append(perf_counter())
        return Passes(num_passes, tuple(after - before for before, after in pairwise(times)))

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _pass(self, token_ids: list[int]) -> int:
        """Compute the tokens after those in the cache, and choose the next one greedily."""
        tokens = (ctypes.c_int32 * len(token_ids))(*token_ids)
        self._compute(self._llama.llama_batch_get_one(tokens, len(token_ids)))
        return self._best_after(-1)

    def _pass_of_many(self, rows: list[list[int]], position: int) -> list[int]:
        """A row of new tokens for each sequence, all of one length and beginning at one position."""
        width = len(rows[0])
        batch = self._llama.llama_batch_init(len(rows) * width, 0, 1)
        batch.n_tokens = len(rows) * width
        for idx, (sequence, offset) in enumerate(product(range(len(rows)), range(width))):
            batch.token[idx], batch.pos[idx] = rows[sequence][offset], position + offset
            batch.n_seq_id[idx], batch.seq_id[idx][0] = 1, sequence
            batch.logits[idx] = offset == width - 1
        self._compute(batch)
        self._llama.llama_batch_free(batch)
        return [self._best_after(sequence * width + width - 1) for sequence in range(len(rows))]

    def _compute(self, batch: Any) -> None:
        status = self._llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _best_after(self, idx: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, idx)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))


# llama.cpp's log goes to a C function that ignores what it is given
_silence = ctypes.cast(ctypes.CDLL(None).abs, ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p))


def _needed(pointer: Any, what: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp could not make {what}")
    return pointer


def _bindings(site: Path | None) -> ModuleType:
    """The ctypes bindings alone: the package around them wants dependencies that nothing here needs."""
    if site is None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("llama-cpp-python is not installed")
        site = Path(spec.origin).parents[1]
    package = ModuleType("llama_cpp")
    package.__path__ = [str(site / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")
