"""llama.cpp as the `xllamacpp` wheel brings it, in a child process."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import xllamacpp

from bench.engines.timed_engine import PROMPT_TOKENS, TimedEngine
from bench.messages import FirstToken, LlamaSetup, Passes, Started
from bench.prompts import random_prompt


class XllamacppEngine(TimedEngine[LlamaSetup]):
    """One model in llama.cpp's server, asked without a socket."""

    def __init__(self) -> None:
        super().__init__("xllamacpp", LlamaSetup)
        self._server: Any = None

    def close(self) -> None:
        self._server = None

    def _start(self, setup: LlamaSetup) -> Started:
        self._vocab_size = setup.vocab_size
        begin = perf_counter()
        self._server = xllamacpp.Server(_params(setup))
        return Started(perf_counter() - begin, f"xllamacpp {xllamacpp.__version__}")

    def _decode(self, num_passes: int, prompt: list[int]) -> Passes:
        """The server's own clock, which starts at the first token: n + 1 tokens are n passes."""
        timings = self._complete(prompt, num_passes + 1, reuse=True)
        assert timings["predicted_n"] == num_passes + 1
        return Passes(num_passes, (timings["predicted_ms"] / 1e3 / num_passes,))

    def _prefill(self, num_tokens: int, seed: int) -> FirstToken:
        timings = self._complete(random_prompt(num_tokens, seed, self._vocab_size), 1, reuse=False)
        assert timings["prompt_n"] == num_tokens
        return FirstToken(num_tokens, timings["prompt_ms"] / 1e3)

    def _greedy(self, num_tokens: int) -> tuple[int, ...]:
        """The server leaves out a token that ends inside a UTF-8 character."""
        prompt = random_prompt(PROMPT_TOKENS, 0, self._vocab_size)
        answer = self._ask(prompt, num_tokens, n_probs=1, cache_prompt=True)
        return tuple(step["id"] for step in answer["choices"][0]["logprobs"]["content"])

    def _decode_batch(self, num_sequences: int, num_passes: int) -> Passes:
        """The server times no batch: this is the time of all passes, the one over the prompts among them."""
        prompts = [random_prompt(PROMPT_TOKENS, seed, self._vocab_size) for seed in range(num_sequences)]
        begin = perf_counter()
        self._ask(prompts, num_passes + 1, cache_prompt=True)
        return Passes(num_passes, ((perf_counter() - begin) / (num_passes + 1),))

    def _complete(self, prompt: list[int], max_tokens: int, *, reuse: bool) -> dict[str, Any]:
        timings: dict[str, Any] = self._ask(prompt, max_tokens, cache_prompt=reuse)["timings"]
        return timings

    def _ask(self, prompt: list[int] | list[list[int]], max_tokens: int, **more: object) -> dict[str, Any]:
        request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}
        answer: dict[str, Any] = self._server.handle_completions(request)
        return answer


def _params(setup: LlamaSetup) -> xllamacpp.CommonParams:
    """The wheel's defaults, but for what would measure something else: no warm-up, no fitting, no saved prompts."""
    params = xllamacpp.CommonParams()
    params.model.path = str(setup.path)
    params.n_ctx = setup.context_tokens
    params.n_parallel = setup.num_sequences
    params.kv_unified = setup.num_sequences > 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup.threads
    params.fit_params = params.warmup = False
    params.cache_ram_mib = params.n_ctx_checkpoints = params.verbosity = 0
    if setup.mode == "mapped":
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        params.no_extra_bufts = True
    elif setup.mode == "direct":
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_DIRECT_IO
    return params
