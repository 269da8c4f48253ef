"""llama.cpp in this process, set up as pipo computes: f16 cache, flash attention, plain weights, one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xllamacpp

from tests.support.llama_cpp_server import LlamaCppServer, plain_params


class LlamaCppEngine(LlamaCppServer):
    """One model, asked by token ids."""

    def __init__(self, path: Path, *, context_tokens: int) -> None:
        super().__init__(_params(path, context_tokens))

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
        return self._post("/completion", prompt=list(prompt), temperature=0, cache_prompt=False, **settings)


def _params(path: Path, context_tokens: int) -> xllamacpp.CommonParams:
    params = plain_params(path, context_tokens)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F16
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return params
