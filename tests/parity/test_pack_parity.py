"""What `pipo pack` writes is what others quantise to, llama.cpp loads it, and both engines compute the same with it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType
from gguf.quants import dequantize

from bench.random_model import SHAPES, write_random_model
from pipo.formats.gguf import open_gguf
from tests.support.engines import start_engine
from tests.support.llama_cpp import LlamaCpp
from tests.support.llama_cpp_engine import LlamaCppEngine
from tests.support.llama_cpp_quantise import llama_cpp_quantize
from tests.support.packs import pack_file, plan_of, stored_bytes, stored_types
from tests.support.rounding import logit_tolerance
from tests.support.tiny_models import SPECS, FloatArray, make_model, write_gguf

NOT_TEXT = range(259)  # specials and bytes
PROMPT_TOKENS, NEW_TOKENS = 60, 6
NAMES = ("llama-tied", "llama-bias", "llama-llama3", "mixtral", "qwen2moe", "qwen3moe")
TABLES = {"opt": "position_embd.weight", "gpt-oss": "blk.1.ffn_up_exps.bias"}  # the exporter quantises them, too
FAMILIES = sorted(SPECS.keys() - TABLES.keys() - {"llama"})
BLOCK_TYPES = [GgufType[name.upper()] for name in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")]
# Bounds on the error that rounding leaves, relative to the deviation of the weights, which are normal; a bit less
# doubles it. Of types that `gguf` cannot quantise to.
K_ERROR = {"q2_k": 0.4, "q3_k": 0.2, "q4_k": 0.09, "q5_k": 0.045, "q6_k": 0.022, "iq4_nl": 0.1, "iq4_xs": 0.1}


@lru_cache
def _exported(name: str, type: GgufType, folder: Path) -> Path:
    path = folder / f"{name}-{type.name}.gguf"
    write_gguf(make_model(SPECS[name]), path, type)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.mark.parametrize(("name", "type"), [*product(FAMILIES, [GgufType.Q4_0]), *product(["llama"], BLOCK_TYPES)])
def test_bytes_are_those_of_gguf_py(name: str, type: GgufType, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    pack_file(_exported(name, GgufType.F32, folder), type.name.lower(), out)
    found, wanted = stored_bytes(out), stored_bytes(_exported(name, type, folder))
    assert found.keys() == wanted.keys()
    assert stored_types(out) == stored_types(_exported(name, type, folder))
    for tensor, data in wanted.items():
        assert np.array_equal(found[tensor], data), tensor


@pytest.mark.parametrize("type", [GgufType.F16, GgufType.BF16, GgufType.Q8_0])
def test_from_another_type_is_from_its_values(type: GgufType, folder: Path, tmp_path: Path) -> None:
    source, out = _exported("llama", type, folder), tmp_path / "packed.gguf"
    pack_file(source, "q4_0", out)
    read = {t.name: t for t in gguf.GGUFReader(source).tensors}
    for tensor, data in stored_bytes(out).items():
        if tensor.startswith("blk.") and "norm" not in tensor:
            values = dequantize(read[tensor].data, read[tensor].tensor_type)
            assert np.array_equal(data, gguf.quants.quantize(values, GgufType.Q4_0).reshape(-1)), tensor


@pytest.mark.parametrize("type", K_ERROR)
def test_types_without_an_oracle_stay_near_the_weights(type: str, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    pack_file(wide, type, out)
    source = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(wide).tensors}
    quantised = [t for t in gguf.GGUFReader(out).tensors if t.tensor_type.name.lower() == type]
    assert len(quantised) >= 7
    for tensor in quantised:
        values, wanted = dequantize(tensor.data, tensor.tensor_type), source[tensor.name]
        error = float(np.sqrt(np.mean(np.square(values - wanted))) / wanted.std())
        assert K_ERROR[type] / 3 < error < K_ERROR[type], tensor.name


@pytest.mark.parametrize("type", ["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
                                  "q3_k", "q2_k", "bf16", "f16"])  # fmt: skip
def test_bytes_are_those_of_llama_cpp(type: str, wide: Path, tmp_path: Path) -> None:
    """As its own build of ggml quantises the same values, to the byte."""
    out = tmp_path / "packed.gguf"
    pack_file(wide, type, out)
    source = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(wide).tensors}
    quantised = [t for t in gguf.GGUFReader(out).tensors if t.tensor_type.name != "F32"]
    assert type.upper() in {t.tensor_type.name for t in quantised}
    for tensor in quantised:
        wanted = llama_cpp_quantize(source[tensor.name], tensor.tensor_type)
        assert tensor.data.tobytes() == wanted.tobytes(), tensor.name


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that blocks of 256 divide."""
    path = tmp_path_factory.mktemp("wide") / "random.F16.gguf"
    write_random_model(path, "smoke", "f16")
    return path


def test_a_mixture_of_types_is_llama_cpps(wide: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "packed.gguf", tmp_path / "other.gguf"
    pack_file(wide, "q4_k_m", out)
    write_random_model(other, "smoke", "q4_k_m")
    found, wanted = stored_types(out), stored_types(other)
    assert {n: t for n, t in found.items() if n.startswith("blk.")} == {
        n: t for n, t in wanted.items() if n.startswith("blk.")
    }
    assert list(found.values()).count("Q4_K") > 1 and list(found.values()).count("Q6_K") > 3


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_tables_that_stay_in_ram_are_as_they_were(name: str, table: str, folder: Path, tmp_path: Path) -> None:
    source, out = _exported(name, GgufType.F32, folder), tmp_path / "packed.gguf"
    pack_file(source, "q4_0", out)
    assert np.array_equal(stored_bytes(out)[table], stored_bytes(source)[table])
    assert "Q4_0" in stored_types(out).values()
    with start_engine(out, context_tokens=64) as engine:
        assert np.isfinite(engine.logits([3, 4, 5, 6])).all()


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_the_same(name: str, type: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    pack_file(_exported(name, GgufType.F32, folder), type, out)
    spec = SPECS[name]
    prompt = [int(t) for t in np.random.default_rng(7).integers(3, spec.vocab_size, PROMPT_TOKENS)]
    _compare(out, prompt, spec.vocab_size, spec.num_layers, GgufType[type.upper()])


@pytest.mark.parametrize("type", ["q2_k", "q3_k", "q4_k", "q4_k_m", "q5_k", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"])
def test_llama_cpp_computes_the_same_with_k_quants(type: str, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    pack_file(wide, type, out)
    shape = SHAPES["smoke"]
    prompt = [int(t) for t in np.random.default_rng(7).integers(259, shape.vocab_size, PROMPT_TOKENS)]
    _compare(out, prompt, shape.vocab_size, shape.num_layers, GgufType.Q8_0)  # activations are Q8_K: rounded as finely


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_a_real_model_computes_the_same(type: str, smollm2_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    pack_file(smollm2_path, type, out)
    with start_engine(out, context_tokens=256, layout="plain") as engine:
        prompt = engine.model.encode("The water cycle describes how water moves above, on and below the ground.")
        ours = _logprobs(engine.logits(prompt)[-1:])[0]
        vocab_size = engine.model.manifest.hyper.vocab_size
    with LlamaCppEngine(out, context_tokens=256) as oracle:
        theirs = oracle.logprobs(prompt, vocab_size)
    assert ours.argmax() == theirs.argmax()
    assert _rms(ours - theirs) < np.sqrt(2) * logit_tolerance(30, GgufType[type.upper()], theirs)


def test_packed_to_its_own_type_nothing_but_the_place_changes(smollm2_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    assert not plan_of(smollm2_path, "q4_1").requantised
    pack_file(smollm2_path, "q4_1", out)
    assert _raw_tensors(smollm2_path) == _raw_tensors(out)


def _raw_tensors(path: Path) -> dict[str, bytes]:
    """As `stored_bytes`; the `gguf` package takes seconds for 49k tokens."""
    raw = path.read_bytes()
    return {s.name: raw[s.extent.offset : s.extent.end] for s in open_gguf(path).tensors.values()}


def _compare(path: Path, prompt: list[int], vocab_size: int, num_layers: int, type: GgufType) -> None:
    theirs = LlamaCpp(path).greedy(prompt, NEW_TOKENS, vocab_size=vocab_size, banned=NOT_TEXT)
    tokens = [*prompt, *theirs.token_ids]
    with start_engine(path, context_tokens=256, layout="plain", cache_type_k="f32", cache_type_v="f32") as engine:
        ours = _logprobs(engine.logits(tokens)[PROMPT_TOKENS - 1 : -1])
    assert _rms(ours - theirs.logprobs) < np.sqrt(2) * logit_tolerance(num_layers, type, ours)


def _logprobs(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float32)


def _rms(errors: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("*.part*"))
