"""The random models of the benches load in llama.cpp, hold what was planned, and keep activations in range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from bench.random_model import MIXES, SHAPES, plan_tensors, write_random_model
from tests.support.llama_cpp import LlamaCpp


@pytest.mark.parametrize("type", MIXES)
def test_llama_cpp_generates(type: str, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    assert write_random_model(path, "smoke", type) == path.stat().st_size
    generated = LlamaCpp(path).greedy("a cat", 4, vocab_size=SHAPES["smoke"].vocab_size, banned=range(259))
    assert len(set(generated.token_ids)) > 1
    assert np.isfinite(generated.logprobs).all()
    assert 1.0 < generated.logprobs.std() < 4.0  # planned: 2


@pytest.mark.parametrize("type", MIXES)
def test_values_have_the_planned_mean_and_deviation(type: str, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write_random_model(path, "smoke", type)
    planned = list(plan_tensors(SHAPES["smoke"], MIXES[type]))
    for tensor, plan in zip(GGUFReader(path).tensors, planned, strict=True):
        values = dequantize(tensor.data, tensor.tensor_type)
        deviation = plan.deviation or 0.0
        # 2^15 values or more, in blocks that share a scale: five standard errors are below 4 %.
        assert (tensor.name, tensor.n_bytes) == (plan.name, plan.num_bytes)
        assert values.mean() == pytest.approx(0.0 if deviation else 1.0, abs=0.04 * deviation)
        assert values.std() == pytest.approx(deviation, rel=0.04)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, "smoke", "q4_0", seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
