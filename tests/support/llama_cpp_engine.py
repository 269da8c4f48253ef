"""llama.cpp in this process, set up as pipo computes: f16 cache, flash attention, plain weights, one thread."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xllamacpp  # type: ignore[import-untyped]


class LlamaCppEngine:
    """One model, asked by token ids. A context manager: leaving it closes the server."""

    def __init__(self, path: Path, *, context_tokens: int) -> None:
        self._server = xllamacpp.Server(_params(path, context_tokens))
        address = urlsplit(self._server.listening_address)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        del self._server

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Up to `num_tokens`; fewer when the model ends."""
        tokens = self._complete(prompt, n_predict=num_tokens, return_tokens=True)["tokens"]
        return [int(token) for token in tokens]

    def logprobs(self, prompt: Sequence[int], vocab_size: int) -> npt.NDArray[np.float32]:
        """Of what comes next, raw, over the whole vocabulary. Cost: 0.5 s for 49k tokens."""
        answer = self._complete(prompt, n_predict=1, n_probs=vocab_size)
        row = np.full(vocab_size, np.nan, dtype=np.float32)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        assert np.isfinite(row).all()
        return row

    def _complete(self, prompt: Sequence[int], **settings: object) -> dict[str, Any]:
        request = {"prompt": list(prompt), "temperature": 0, "cache_prompt": False, **settings}
        self._connection.request("POST", "/completion", json.dumps(request), {"Content-Type": "application/json"})
        answer = json.loads(self._connection.getresponse().read())
        assert isinstance(answer, dict) and "error" not in answer, answer
        return answer


def _params(path: Path, context_tokens: int) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context_tokens
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F16
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_extra_bufts = True
    params.fit_params = params.warmup = params.cache_prompt = False
    params.cache_ram_mib = params.n_ctx_checkpoints = params.verbosity = 0
    return params
