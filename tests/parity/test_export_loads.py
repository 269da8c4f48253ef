"""The tiny checkpoints, exported, run in llama.cpp as transformers computes them.

Our loader is tested against these files; llama.cpp proves the files themselves, so exporter and loader cannot
share a mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType
from gguf import GGUFReader

from tests.support import tiny_families, tiny_models
from tests.support.llama_cpp import Generated, LlamaCpp
from tests.support.rounding import PRODUCT_ERROR, logit_tolerance
from tests.support.tiny_models import SPECS, FloatArray, TinySpec, make_model, reference_logits, write_gguf
from tests.support.tiny_vocab import Tokenizer

# llama.cpp has no OPT, and lets no layer of a Mistral or Phi-3 slide
UNLIKE_LLAMA_CPP = {"mistral-sliding", "opt", "phi3-sliding"}
NOT_TEXT = range(259)  # specials and bytes
PROMPT_TOKENS, NEW_TOKENS = 100, 8


@pytest.mark.parametrize("name", sorted(SPECS.keys() - UNLIKE_LLAMA_CPP))
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    got, want = _both(SPECS[name], tmp_path)
    tolerance = logit_tolerance(SPECS[name].num_layers, GgufType.F32, want)
    _assert_same(got, want, tolerance + 1.5 * _error_of_gelu(SPECS[name], got.token_ids))


@pytest.mark.parametrize("type", PRODUCT_ERROR)
def test_every_type_computes_the_same(type: GgufType, tmp_path: Path) -> None:
    got, want = _both(SPECS["llama"], tmp_path, type)
    _assert_same(got, want, logit_tolerance(SPECS["llama"].num_layers, type, want))


@pytest.mark.parametrize("name", ["llama-yarn", "llama-linear", "llama-llama3"])
def test_rope_scaling_shows_in_the_logits(name: str, tmp_path: Path) -> None:
    scaled = SPECS[name]
    got, want = _both(scaled, tmp_path)
    plain = TinySpec(is_tied=scaled.is_tied, rope_theta=scaled.rope_theta, seed=scaled.seed)
    unscaled = _logprobs(reference_logits(make_model(plain), _prompt(plain)))[-1]
    assert _rms(got.logprobs[0] - unscaled) > 1000 * logit_tolerance(scaled.num_layers, GgufType.F32, want)


def test_a_wrong_row_order_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "pair_neighbours", lambda weight, num_heads: weight)
    got, want = _both(SPECS["llama"], tmp_path)
    assert _rms(got.logprobs - want) > 1000 * logit_tolerance(SPECS["llama"].num_layers, GgufType.F32, want)


@pytest.mark.parametrize("tokenizer", ["spm", "gpt2"])
def test_tokenizer_accepts_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(make_model(SPECS["llama"]), path, tokenizer=tokenizer)
    text = LlamaCpp(path).greedy("a cat – 猫", 4, vocab_size=320, banned=NOT_TEXT)
    assert len(text.token_ids) == 4


def test_same_spec_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(make_model(SPECS["mistral"]), tmp_path / name, GgufType.Q8_0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_order_is_a_converted_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(make_model(SPECS["llama-llama3"]), path)
    names = [tensor.name for tensor in GGUFReader(path).tensors]
    assert names[:4] == ["rope_freqs.weight", "token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.weight"]
    assert names[-2:] == ["blk.1.attn_v.weight", "output_norm.weight"]


def _prompt(spec: TinySpec) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(3, spec.vocab_size, PROMPT_TOKENS)]


def _both(spec: TinySpec, tmp_path: Path, type: GgufType = GgufType.F32) -> tuple[Generated, FloatArray]:
    """What llama.cpp generates, and transformers' log-probabilities along the same tokens."""
    model, prompt, path = make_model(spec), _prompt(spec), tmp_path / "tiny.gguf"
    write_gguf(model, path, type)
    got = LlamaCpp(path).greedy(prompt, NEW_TOKENS, vocab_size=spec.vocab_size, banned=NOT_TEXT)
    tokens = [*prompt, *got.token_ids]
    want = _logprobs(reference_logits(tiny_models.rounded_model(model, type), tokens))
    return got, want[PROMPT_TOKENS - 1 : -1]


def _error_of_gelu(spec: TinySpec, new_tokens: Sequence[int]) -> float:
    """What a GELU of half precision, as llama.cpp has it, changes in these logits; 0 for families without one."""
    tokens = [*_prompt(spec), *new_tokens]
    models = make_model(spec), tiny_families.with_gelu_of_ggml(make_model(spec))
    exact, rounded = (_logprobs(reference_logits(model, tokens))[PROMPT_TOKENS - 1 : -1] for model in models)
    return _rms(rounded - exact)


def _assert_same(got: Generated, want: FloatArray, tolerance: float) -> None:
    assert got.logprobs.shape == want.shape == (NEW_TOKENS, want.shape[1])
    assert _rms(got.logprobs - want) < tolerance
    assert np.abs(got.logprobs - want).max() < 6 * tolerance
    text = want[:, len(NOT_TEXT) :]
    chosen = want[np.arange(NEW_TOKENS), list(got.token_ids)]
    assert (text.max(axis=1) - chosen).max() < 6 * tolerance  # greedy, up to ties


def _logprobs(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float32)


def _rms(errors: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
