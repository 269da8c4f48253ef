"""Rows that layers which slide have left behind take no memory, and nobody misses them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipo.engine import Engine
from pipo.generation.request import SamplingParams
from pipo.kvcache.cache import kv_shape
from pipo.pipeline import blueprint
from tests.support.engines import start_engine
from tests.support.tiny_families import WINDOW
from tests.support.tiny_models import SPECS, make_model, reference_logits, write_gguf
from tests.support.truth import F32_CACHE, MAX_ERROR, relative_error

SPEC = replace(SPECS["gemma3"], context_tokens=1024)
CHUNK, NUM_TOKENS = 16, 600
TOKENS = [int(token) for token in np.random.default_rng(3).integers(3, SPEC.vocab_size, NUM_TOKENS)]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere reading what was given back takes memory")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sliding") / "gemma3.gguf"
    write_gguf(make_model(SPEC), path)
    return path


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with start_engine(path, prefill_chunk=CHUNK, max_outputs=CHUNK, context_tokens=1024, **F32_CACHE) as engine:
        yield engine


def kv_bytes(engine: Engine) -> int:
    return engine.ledger_breakdown["KV cache"]


def test_the_same_bits_in_less_memory(engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml's rotary angles, in F32, lose a digit by position 600: against transformers the bound is wider here."""
    got = engine.logits(TOKENS)
    assert relative_error(got, reference_logits(make_model(SPEC), TOKENS)) < 5 * MAX_ERROR
    monkeypatch.setattr(blueprint, "kv_shape", lambda *arguments: kv_shape(*arguments[:5]))
    with start_engine(path, prefill_chunk=CHUNK, max_outputs=CHUNK, context_tokens=1024, **F32_CACHE) as keeping_all:
        np.testing.assert_array_equal(got, keeping_all.logits(TOKENS))
        assert kv_bytes(keeping_all) > 3 * kv_bytes(engine)
    row_bytes = 2 * 4 * SPEC.num_kv_heads * (SPEC.head_dim or 0)
    num_sliding = 6  # of seven layers
    kept = WINDOW + CHUNK + 3 * 32
    assert kv_bytes(engine) < row_bytes * (640 + num_sliding * kept) + 14 * 4096
    assert engine.plan is not None
    assert engine.plan.placement.fixed["KV cache"] < row_bytes * (1024 + num_sliding * kept) + 14 * 4096


@pytest.mark.parametrize(("num_shared", "is_resumed"), [(595, True), (560, True), (400, False), (0, False)])
def test_what_is_gone_is_computed_again(engine: Engine, path: Path, num_shared: int, is_resumed: bool) -> None:
    engine.complete(TOKENS, GREEDY)
    other = [*TOKENS[:num_shared], *reversed(TOKENS[num_shared:])]
    got = engine.complete(other, GREEDY)
    assert (got.usage.cached_tokens > 0) is is_resumed
    with start_engine(path, prefill_chunk=CHUNK, context_tokens=1024, **F32_CACHE) as fresh:
        assert got.text == fresh.complete(other, GREEDY).text
