"""Every member of the family that pipo claims to run computes what `transformers` computes in float32."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from pipo.base.config import EngineConfig
from pipo.base.errors import UsageError
from tests.support import tiny_families, tiny_models
from tests.support.engines import start_engine
from tests.support.rigs import Rig, read_prompts
from tests.support.rounding import PRODUCT_ERROR, logit_tolerance
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
    rms,
    tokens_of,
    truth_of,
)

CHUNKS = (1, 7, 33, 64, 150)  # decode; remainders of 3, 18 and 22 tokens; tiled attention; all at once


class PathOf(Protocol):
    """Of the file that carries a spec with weights of a type."""

    def __call__(self, name: str, type: GgufType = ...) -> Path: ...


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> PathOf:
    folder = tmp_path_factory.mktemp("tiny")

    @lru_cache
    def path(name: str, type: GgufType = GgufType.F32) -> Path:
        write_gguf(model_of(name), folder / f"{name}-{type.name}.gguf", type)
        return folder / f"{name}-{type.name}.gguf"

    return path


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_float32(name: str, chunk: int, path_of: PathOf) -> None:
    assert relative_error(logits_of(path_of(name), name, chunk), truth_of(name)) < MAX_ERROR


@pytest.mark.parametrize("name", SPECS)
def test_float32_streamed(name: str, path_of: PathOf) -> None:
    assert_right_while_all_streams(path_of(name), name)


@pytest.mark.parametrize("name", SPECS)
def test_prefill_and_decode_as_a_request_runs_them(name: str, path_of: PathOf) -> None:
    assert_request_is_answered(path_of(name), name)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("is_tight", [True, False])
def test_two_sequences_in_one_batch(name: str, is_tight: bool, path_of: PathOf) -> None:
    """Of 70 tokens and of 9: each gets what it would get alone, with weights that stay and weights that stream.

    Phi-3's rotary factors are those of the context, where transformers takes those of the text: longer ones, then.
    """
    second = 66 if name == "phi3" else 9
    prompts, new = [tokens_of(name)[:70], tokens_of(name)[70 : 70 + second]], [[5, 6, 7], [8, 9, 10]]
    config = EngineConfig(threads=1, prefill_chunk=33, num_sequences=2, **F32_CACHE)
    with Rig(path_of(name), config) as rig, rig.running(rig.placements(2)[0 if is_tight else 1]) as forward:
        rows = [read_prompts(forward, prompts, 33)]
        for i, pair in enumerate(zip(*new, strict=True)):
            rows.append(forward.run_batch(pair, [len(prompt) + i for prompt in prompts]).copy())
    for i, (prompt, more) in enumerate(zip(prompts, new, strict=True)):
        want = reference_logits(model_of(name), [*prompt, *more])[len(prompt) - 1 :]
        assert relative_error(np.stack(rows)[:, i], want) < MAX_ERROR


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"WINDOW": 1000}),
        ("gemma2", {"CAPS": {"attn_logit_softcapping": 1e6, "final_logit_softcapping": 5.0}}),
        ("gemma2", {"CAPS": {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 1e6}}),
        ("gemma3", {"WINDOW": 1000}),
        ("gemma3", {"LOCAL_THETA": 10_000.0}),
        ("phi3", {"LONG": tiny_families.SHORT}),
        ("phi3-sliding", {"WINDOW": 1000}),
        ("smollm3", {"UNROTATED": ()}),
    ],
)
def test_what_a_family_adds_shows(name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not see it missing."""
    truth = truth_of(name)
    for setting, value in changes.items():
        monkeypatch.setattr(tiny_families, setting, value)
    assert relative_error(reference_logits(make_model(SPECS[name]), tokens_of(name)), truth) > 100 * MAX_ERROR


def test_a_context_within_the_original_one_takes_the_short_factors(path_of: PathOf) -> None:
    prompt = tokens_of("phi3")[:60]
    with start_engine(path_of("phi3"), max_outputs=60, context_tokens=64, **F32_CACHE) as engine:
        got = engine.logits(prompt)
    assert relative_error(got, reference_logits(model_of("phi3"), prompt)) < MAX_ERROR


@pytest.mark.parametrize("name", ["llama-yarn", "llama-linear", "llama-llama3"])
def test_rope_scaling_shows(name: str) -> None:
    """Else the tests above could not see it missing."""
    scaled = SPECS[name]
    plain = tiny_models.TinySpec(is_tied=scaled.is_tied, rope_theta=scaled.rope_theta, seed=scaled.seed)
    unscaled = reference_logits(make_model(plain), tokens_of(name))
    assert relative_error(unscaled, truth_of(name)) > 1000 * MAX_ERROR


QUANTISED = [type for type in PRODUCT_ERROR if type is not GgufType.F32]


@pytest.mark.parametrize("chunk", [1, NUM_TOKENS])
@pytest.mark.parametrize(
    ("type", "layout"), [*((type, "plain") for type in QUANTISED), (GgufType.Q4_0, "repacked")], ids=str
)
def test_types(type: GgufType, layout: str, chunk: int, path_of: PathOf) -> None:
    """Against the weights as they are stored: what is left is how kernels round activations, to 8 bits for Q types.

    A block's 32 activations become integers up to 127: errors are uniform over steps of max / 127, see PRODUCT_ERROR.
    """
    got = logits_of(path_of("llama", type), "llama", chunk, layout=layout)
    want = truth_of("llama", type)
    tolerance = logit_tolerance(SPECS["llama"].num_layers, type, want)
    assert rms(got - want) < tolerance
    assert np.abs(got - want).max() < 6 * tolerance


@pytest.mark.parametrize("type", [GgufType.Q4_0, GgufType.Q4_1])
def test_tolerance_sees_the_rounding_of_weights(type: GgufType) -> None:
    """4-bit weights are off by 8 %, activations by 0.5 %: the wrong weights would not pass."""
    want = truth_of("llama", type)
    assert rms(truth_of("llama") - want) > 2 * logit_tolerance(SPECS["llama"].num_layers, type, want)


# Relative root mean square rounding of a key or value; Q4_0's step is an eighth of the largest of a block.
_CACHE_ERROR = {
    "f32": 0.0,
    "f16": 2**-11 / math.sqrt(3),
    "q8_0": PRODUCT_ERROR[GgufType.Q8_0],
    "q4_0": 2.1 / 8 / math.sqrt(12),
}
_QUERY_ERROR = {**_CACHE_ERROR, "q4_0": _CACHE_ERROR["q8_0"]}  # queries are rounded to what keys are multiplied with
_CACHE_KINDS = [kinds for kinds in product(_CACHE_ERROR, repeat=2) if kinds != ("f32", "f32")]


@pytest.mark.parametrize("kinds", _CACHE_KINDS, ids="-".join)
@pytest.mark.parametrize("chunk", [1, NUM_TOKENS])
def test_cache_types(kinds: tuple[str, str], chunk: int, path_of: PathOf) -> None:
    """Scores have a deviation near 2, so a key's or query's rounding moves them, and the weights of values, by twice
    as much. Values in f16 are added up in f16 too, with a new rounding at every one of up to 150 positions.
    """
    k, v = kinds
    name = "llama-wide-heads"  # 32: a whole block
    got = logits_of(path_of(name), name, chunk, cache_type_k=k, cache_type_v=v)
    keys, values, queries = _CACHE_ERROR[k], _CACHE_ERROR[v], _QUERY_ERROR[k]
    sums = values * math.sqrt(NUM_TOKENS) if v == "f16" else 0.0
    attention = math.sqrt(4 * keys**2 + 4 * queries**2 + values**2 + sums**2)
    want = truth_of(name)
    error = rms(got - want) / float(want.std())
    assert error < 3 * attention * math.sqrt(SPECS[name].num_layers)
    assert error > 0.1 * max(keys, values), "the cache is not of these types"


def test_cache_type_that_does_not_fit_the_heads(path_of: PathOf) -> None:
    with pytest.raises(UsageError, match="heads of a multiple of 32, this model's have 16"):
        start_engine(path_of("llama"), cache_type_k="q8_0")
