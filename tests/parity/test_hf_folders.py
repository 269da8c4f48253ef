"""A Hugging Face folder computes what `transformers` computes from it, and what the same model as GGUF does."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgufType
from transformers import PreTrainedModel

from pipo.generation.request import SamplingParams
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.hf_folders import save_folder
from tests.support.rounding import logit_tolerance
from tests.support.tiny_models import SPECS, FloatArray, make_model, reference_logits, write_gguf

MAX_ERROR = 1e-4  # largest difference over largest logit, at each position
NUM_TOKENS, NUM_NEW = 150, 8
F32_CACHE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
NAMES = [name for name in SPECS if SPECS[name].family != "gpt-oss"]  # whose experts would need a transpose
SHARDED = ["llama-tied", "mixtral", "qwen3moe"]


@lru_cache
def model_of(name: str) -> PreTrainedModel:
    return make_model(SPECS[name])


def tokens_of(name: str) -> list[int]:
    rng = np.random.default_rng(SPECS[name].seed)
    return [int(token) for token in rng.integers(3, SPECS[name].vocab_size, NUM_TOKENS)]


@lru_cache
def truth_of(name: str) -> FloatArray:
    return reference_logits(model_of(name), tokens_of(name))


class FolderOf(Protocol):
    def __call__(self, name: str, dtype: torch.dtype = ..., max_shard_size: str = ...) -> Path: ...


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    home = tmp_path_factory.mktemp("hf")

    @lru_cache
    def folder(name: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        path = home / f"{name}-{str(dtype).rpartition('.')[2]}-{max_shard_size}"
        return save_folder(make_model(SPECS[name]), path, dtype, max_shard_size=max_shard_size)

    return folder


def logits_of(path: Path, name: str, chunk: int = NUM_TOKENS, **settings: Any) -> FloatArray:
    with start_engine(path, max_outputs=chunk, prefill_chunk=chunk, **{**F32_CACHE, **settings}) as engine:
        return engine.logits(tokens_of(name))


def relative_error(got: FloatArray, want: FloatArray) -> float:
    assert got.shape == want.shape
    return float((np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 33, NUM_TOKENS])
def test_float32(name: str, chunk: int, folder_of: FolderOf) -> None:
    assert relative_error(logits_of(folder_of(name), name, chunk), truth_of(name)) < MAX_ERROR


@pytest.mark.parametrize("name", NAMES)
def test_float32_streamed(name: str, folder_of: FolderOf) -> None:
    smallest = smallest_ram_bytes(folder_of(name), max_outputs=33, prefill_chunk=33, **F32_CACHE)
    got = logits_of(folder_of(name), name, 33, ram_bytes=smallest)
    assert relative_error(got, truth_of(name)) < MAX_ERROR


@pytest.mark.parametrize("name", SHARDED)
def test_shards(name: str, folder_of: FolderOf) -> None:
    folder = folder_of(name, max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    smallest = smallest_ram_bytes(folder, max_outputs=33, prefill_chunk=33, **F32_CACHE)
    resident, streamed = logits_of(folder, name, 33), logits_of(folder, name, 33, ram_bytes=smallest)
    np.testing.assert_array_equal(resident.view(np.uint32), streamed.view(np.uint32))
    assert relative_error(resident, truth_of(name)) < MAX_ERROR


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_as_a_request_runs_them(name: str, folder_of: FolderOf) -> None:
    prompt = tokens_of(name)
    with start_engine(folder_of(name), prefill_chunk=33, **F32_CACHE) as engine:
        params = SamplingParams(temperature=0, max_tokens=NUM_NEW, logprobs=0, ignore_eos=True)
        chosen = engine.complete(prompt, params).tokens
    ids = [token.token_id for token in chosen]
    logits = reference_logits(model_of(name), [*prompt, *ids]).astype(np.float64)[NUM_TOKENS - 1 : -1]
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    picked = want[np.arange(NUM_NEW), ids]
    tolerance = 2 * MAX_ERROR * np.abs(logits).max()
    assert np.abs(picked - [token.logprob for token in chosen]).max() < tolerance
    assert (want.max(axis=1) - picked).max() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_as_gguf(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """Rows of q and k lie in another order in a GGUF of some families, so sums are rounded in another order."""
    write_gguf(model_of(name), tmp_path / "model.gguf")
    ours, theirs = logits_of(folder_of(name), name), logits_of(tmp_path / "model.gguf", name)
    assert relative_error(ours, theirs) < MAX_ERROR / 10


_TYPES = {torch.bfloat16: GgufType.BF16, torch.float16: GgufType.F16}


@pytest.mark.parametrize("name", ["llama", "llama-bias", "opt", "qwen2moe"])
@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_half_precision(name: str, dtype: torch.dtype, folder_of: FolderOf) -> None:
    """Against the weights as they are stored, vectors and routers too; products round activations to the same type.

    Where two experts score alike, rounding may choose the other one: at few positions.
    """
    rounded = make_model(SPECS[name]).to(dtype).to(torch.float32)
    want = reference_logits(rounded, tokens_of(name))
    got = logits_of(folder_of(name, dtype), name)
    tolerance = logit_tolerance(SPECS[name].num_layers, _TYPES[dtype], want)
    errors = np.sqrt(np.mean(np.square(got - want), axis=1))
    assert np.quantile(errors, 0.9 if "moe" in name else 1.0) < 2 * tolerance


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_half_precision_as_gguf(name: str, dtype: torch.dtype, folder_of: FolderOf, tmp_path: Path) -> None:
    """The GGUF has the same matrices in the same order of rows, and the same vectors in F32, some as 1 + w."""
    rounded = make_model(SPECS[name]).to(dtype).to(torch.float32)
    write_gguf(rounded, tmp_path / "model.gguf", _TYPES[dtype])
    ours, theirs = logits_of(folder_of(name, dtype), name), logits_of(tmp_path / "model.gguf", name)
    assert relative_error(ours, theirs) < 1e-5
