"""llama.cpp in this process, set up to be an oracle: float32 KV cache, no flash attention, no repacked weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xllamacpp

from tests.support.llama_cpp_server import plain_params


@dataclass(frozen=True, slots=True)
class Generated:
    """`logprobs` of the whole vocabulary before each token, of the raw distribution. Shape: (tokens, vocab)."""

    token_ids: tuple[int, ...]
    logprobs: npt.NDArray[np.float32]


class LlamaCpp:
    """One model. Threads: 1, so that runs repeat exactly."""

    def __init__(self, path: Path, *, context_tokens: int = 256, adapters: Sequence[tuple[Path, float]] = ()) -> None:
        """`adapters` with their scales."""
        params = _params(path, context_tokens)
        if adapters:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), scale) for file, scale in adapters]
        self._server = xllamacpp.Server(params)

    def greedy(
        self, prompt: Sequence[int] | str, num_tokens: int, *, vocab_size: int, banned: Sequence[int] = ()
    ) -> Generated:
        """Generate without tokens in `banned`, which keep their place in `logprobs`.

        Ban the byte tokens: the server leaves out every token that ends inside a UTF-8 character.
        """
        answer = self._server.handle_completions(
            {
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "max_tokens": num_tokens,
                "temperature": 0,
                "n_probs": vocab_size,
                "logit_bias": [[token_id, False] for token_id in banned],
                "cache_prompt": False,
            }
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        return Generated(tuple(step["id"] for step in steps), np.stack([_row(step, vocab_size) for step in steps]))


def _row(step: dict[str, Any], vocab_size: int) -> npt.NDArray[np.float32]:
    row = np.full(vocab_size, -np.inf, dtype=np.float32)
    for entry in step["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


def _params(path: Path, context_tokens: int) -> xllamacpp.CommonParams:
    params = plain_params(path, context_tokens)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params
