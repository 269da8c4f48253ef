"""The tiny checkpoints against transformers: the same tokens, tolerances and questions for every form of a model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GgufType
from transformers import PreTrainedModel

from pipo.generation.request import SamplingParams
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.tiny_models import SPECS, FloatArray, make_model, reference_logits, rounded_model

MAX_ERROR = 1e-4  # largest difference over largest logit, at each position; 1e-6 to 4e-6 measured
NUM_TOKENS, NUM_NEW = 150, 8  # more than half of the 256 rows of a context
F32_CACHE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}


@lru_cache
def model_of(name: str) -> PreTrainedModel:
    return make_model(SPECS[name])


def tokens_of(name: str) -> list[int]:
    rng = np.random.default_rng(SPECS[name].seed)
    return [int(token) for token in rng.integers(3, SPECS[name].vocab_size, NUM_TOKENS)]


@lru_cache
def truth_of(name: str, type: GgufType = GgufType.F32) -> FloatArray:
    return reference_logits(rounded_model(model_of(name), type), tokens_of(name))


def logits_of(path: Path, name: str, chunk: int = NUM_TOKENS, **settings: Any) -> FloatArray:
    with start_engine(path, max_outputs=chunk, prefill_chunk=chunk, **{**F32_CACHE, **settings}) as engine:
        return engine.logits(tokens_of(name))


def relative_error(got: FloatArray, want: FloatArray) -> float:
    """Of the worst row."""
    assert got.shape == want.shape
    return float((np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)).max())


def rms(errors: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def assert_right_while_all_streams(path: Path, name: str) -> None:
    """At the smallest budget."""
    smallest = smallest_ram_bytes(path, max_outputs=33, prefill_chunk=33, **F32_CACHE)
    assert relative_error(logits_of(path, name, 33, ram_bytes=smallest), truth_of(name)) < MAX_ERROR


def assert_request_is_answered(path: Path, name: str) -> None:
    """Chunks without outputs, then one token at a time: probabilities of the tokens it chose, and greedy by them."""
    prompt = tokens_of(name)
    with start_engine(path, prefill_chunk=33, **F32_CACHE) as engine:
        params = SamplingParams(temperature=0, max_tokens=NUM_NEW, logprobs=0, ignore_eos=True)
        chosen = engine.complete(prompt, params).tokens
    ids = [token.token_id for token in chosen]
    logits = reference_logits(model_of(name), [*prompt, *ids]).astype(np.float64)[NUM_TOKENS - 1 : -1]
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    picked = want[np.arange(NUM_NEW), ids]
    tolerance = 2 * MAX_ERROR * np.abs(logits).max()
    assert np.abs(picked - [token.logprob for token in chosen]).max() < tolerance
    assert (want.max(axis=1) - picked).max() < tolerance
