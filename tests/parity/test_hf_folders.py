"""A Hugging Face folder computes what `transformers` computes from it, and what the same model as GGUF does."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgufType

from tests.support.engines import smallest_ram_bytes
from tests.support.hf_folders import save_folder
from tests.support.rounding import logit_tolerance
from tests.support.tiny_models import SPECS, make_model, reference_logits, write_gguf
from tests.support.truth import (
    F32_CACHE,
    MAX_ERROR,
    NUM_TOKENS,
    assert_request_is_answered,
    assert_right_while_all_streams,
    logits_of,
    model_of,
    relative_error,
    tokens_of,
    truth_of,
)

NAMES = [name for name in SPECS if SPECS[name].family != "gpt-oss"]  # whose experts would need a transpose
SHARDED = ["llama-tied", "mixtral", "qwen3moe"]


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 33, NUM_TOKENS])
def test_float32(name: str, chunk: int, folder_of: FolderOf) -> None:
    assert relative_error(logits_of(folder_of(name), name, chunk), truth_of(name)) < MAX_ERROR


@pytest.mark.parametrize("name", NAMES)
def test_float32_streamed(name: str, folder_of: FolderOf) -> None:
    assert_right_while_all_streams(folder_of(name), name)


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
    assert_request_is_answered(folder_of(name), name)


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
