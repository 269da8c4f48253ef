"""A Hugging Face folder packed is what llama.cpp's converter would make of it, bit for bit, and runs the same."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgufType
from safetensors.torch import save_file

from pipo.base.errors import OverBudget
from pipo.formats.gguf import open_gguf
from pipo.formats.hf_text import read_text_side
from pipo.packing import plan as plan_module
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.tokenizer import Tokenizer
from tests.support.engines import start_engine
from tests.support.hf_bytes import HEADS, HIDDEN, INNER, KV_HEADS, VOCAB, arrays_of, write_folder
from tests.support.hf_bytes import SHAPES as BYTES_SHAPES
from tests.support.hf_folders import save_folder
from tests.support.llama_cpp import LlamaCpp
from tests.support.llama_cpp_tokens import LlamaCppTokens
from tests.support.packs import pack_file, plan_of
from tests.support.texts import mixed_texts
from tests.support.tiny_models import SPECS, FloatArray, make_model, write_gguf
from tests.support.tiny_vocab import Tokenizer as Vocabulary
from tests.support.tokenizer_files import smollm2_json

NAMES = [name for name in SPECS if SPECS[name].family != "gpt-oss"]  # whose experts would need a transpose
NOT_TEXT = range(259)  # specials and bytes
NUM_TOKENS, NUM_NEW = 100, 4
F32_CACHE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "layout": "plain"}


@lru_cache
def exported(name: str, home: Path, type: GgufType = GgufType.F32, tokenizer: Vocabulary = "gpt2") -> Path:
    path = home / f"{name}-{type.name}-{tokenizer}.gguf"
    write_gguf(make_model(SPECS[name]), path, type, tokenizer=tokenizer)
    return path


@lru_cache
def packed(name: str, home: Path, type: str = "f32", tokenizer: Vocabulary = "gpt2") -> Path:
    """In a folder that llama.cpp does not take for a Phi-3's by its name."""
    folder = save_folder(make_model(SPECS[name]), home / f"{name}-{tokenizer}" / "tiny", tokenizer=tokenizer)
    path = home / f"{name}-{type}-{tokenizer}-packed.gguf"
    pack_file(folder, type, path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def tokens_of(name: str) -> list[int]:
    rng = np.random.default_rng(SPECS[name].seed)
    return [int(token) for token in rng.integers(3, SPECS[name].vocab_size, NUM_TOKENS)]


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    read = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape), t.data.tobytes()) for t in read}


def assert_same_tensors(found: Path, wanted: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name] == tensor, name


def logits_of(path: Path, name: str) -> FloatArray:
    with start_engine(path, max_outputs=NUM_TOKENS, prefill_chunk=NUM_TOKENS, **F32_CACHE) as engine:
        return engine.logits(tokens_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_converter(name: str, home: Path) -> None:
    assert_same_tensors(packed(name, home), exported(name, home))


@pytest.mark.parametrize("name", NAMES)
def test_pipo_computes_the_same(name: str, home: Path) -> None:
    ours, theirs = logits_of(packed(name, home), name), logits_of(exported(name, home), name)
    assert theirs.std() > 0.1
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "opt"])  # llama.cpp has no OPT
def test_llama_cpp_computes_the_same(name: str, home: Path) -> None:
    prompt, size = tokens_of(name), SPECS[name].vocab_size
    ours, theirs = (
        LlamaCpp(path).greedy(prompt, NUM_NEW, vocab_size=size, banned=NOT_TEXT)
        for path in (packed(name, home), exported(name, home))
    )
    assert ours.token_ids == theirs.token_ids
    np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)


@pytest.mark.parametrize("name", ["llama-bias", "mixtral", "phi3", "opt"])
def test_keys_are_those_of_the_converter(name: str, home: Path) -> None:
    ours, theirs = (open_gguf(path).metadata for path in (packed(name, home), exported(name, home)))
    for key in theirs:
        if key.startswith("general.") or key == "tokenizer.ggml.unknown_token_id":
            continue  # names; and byte pairs know no unknown token
        wanted = theirs.get(key)
        if isinstance(wanted, bool | int | str):
            assert ours.get(key) == wanted, key
        elif isinstance(wanted, float):
            assert np.float32(ours.get(key)) == pytest.approx(wanted, rel=1e-6), key
    for key in ("tokens", "merges"):
        assert ours.strings(f"tokenizer.ggml.{key}") == theirs.strings(f"tokenizer.ggml.{key}")
    assert ours.array("tokenizer.ggml.token_type").tolist() == theirs.array("tokenizer.ggml.token_type").tolist()


def test_quantised(home: Path) -> None:
    assert_same_tensors(packed("smollm3", home, "q8_0"), exported("smollm3", home, GgufType.Q8_0))
    ours, theirs = (
        logits_of(path, "smollm3")
        for path in (packed("smollm3", home, "q8_0"), exported("smollm3", home, GgufType.Q8_0))
    )
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-bias", "gemma2", "opt", "qwen2moe", "mixtral"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Vectors, routers and tables of positions are widened; matrices widened or copied."""
    folder = save_folder(make_model(SPECS[name]), tmp_path / "tiny", dtype)
    write_gguf(make_model(SPECS[name]).to(dtype).to(torch.float32), tmp_path / "wanted.gguf")
    pack_file(folder, "f32", tmp_path / "found.gguf")
    assert_same_tensors(tmp_path / "found.gguf", tmp_path / "wanted.gguf")
    kept = "bf16" if dtype is torch.bfloat16 else "f16"
    pack_file(folder, kept, tmp_path / "kept.gguf")
    pack_file(tmp_path / "wanted.gguf", kept, tmp_path / "twice.gguf")
    assert_same_tensors(tmp_path / "kept.gguf", tmp_path / "twice.gguf")


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "qwen3moe"])
def test_shards(name: str, home: Path, tmp_path: Path) -> None:
    folder = save_folder(make_model(SPECS[name]), tmp_path / "tiny", max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    pack_file(folder, "f32", tmp_path / "out.gguf")
    assert_same_tensors(tmp_path / "out.gguf", exported(name, home))


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe"])
def test_experts_in_one_tensor(name: str, home: Path, tmp_path: Path) -> None:
    folder = save_folder(make_model(SPECS[name]), tmp_path / "tiny")
    weights = {key: value.contiguous() for key, value in make_model(SPECS[name]).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    pack_file(folder, "f32", tmp_path / "out.gguf")
    assert_same_tensors(tmp_path / "out.gguf", exported(name, home))


@pytest.mark.parametrize("num_spaces", [1, 3, 4090])
def test_data_that_begins_anywhere(num_spaces: int, home: Path, tmp_path: Path) -> None:
    folder = save_folder(make_model(SPECS["llama-bias"]), tmp_path / "tiny")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * num_spaces
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    pack_file(folder, "q8_0", tmp_path / "out.gguf")
    assert_same_tensors(tmp_path / "out.gguf", exported("llama-bias", home, GgufType.Q8_0))


def test_heads_larger_than_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the least memory a head's rows take several groups, and the result is the same."""
    monkeypatch.setattr(plan_module, "process_bytes_now", lambda: 0)  # of this one, which has torch and grows
    sizes = {HIDDEN: 1024, INNER: 2048, HIDDEN * KV_HEADS // HEADS: 512}
    shapes = {name: tuple(sizes.get(n, n) for n in shape) for name, shape in BYTES_SHAPES.items()}
    folder = write_folder(tmp_path / "tiny", arrays_of(shapes), hidden_size=1024, intermediate_size=2048)
    with pytest.raises(OverBudget) as refused:
        plan_of(folder, "f16", limit_bytes=1)
    smallest = refused.value.smallest_bytes
    head_bytes = 1024 // HEADS * 1024 * 4
    tight = plan_of(folder, "f16", limit_bytes=smallest).memory
    assert tight.group_bytes < head_bytes < plan_of(folder, "f16").memory.group_bytes
    pack_file(folder, "f16", tmp_path / "roomy.gguf")
    pack_file(folder, "f16", tmp_path / "tight.gguf", limit_bytes=smallest)
    assert (tmp_path / "roomy.gguf").read_bytes() == (tmp_path / "tight.gguf").read_bytes()


def test_sentence_pieces(home: Path) -> None:
    ours, theirs = packed("llama", home, tokenizer="spm"), exported("llama", home, tokenizer="spm")
    assert_same_tensors(ours, theirs)
    found, wanted = (Tokenizer.from_metadata(open_gguf(path).metadata) for path in (ours, theirs))
    with LlamaCppTokens(ours) as oracle:
        for text in mixed_texts(5, 200):
            ids = wanted.encode(text, add_special=True, parse_special=True)
            assert found.encode(text, add_special=True, parse_special=True) == ids
            if "\0" not in text:
                assert oracle.encode(text, add_special=True, parse_special=True) == ids, text


def test_the_vocabulary_of_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    """Of 49152 tokens: the ids of the tokenizer.json, of the GGUF that it was made from, and of llama.cpp."""
    shapes = {name: (49152, *shape[1:]) if shape[0] == VOCAB else shape for name, shape in BYTES_SHAPES.items()}
    folder = write_folder(tmp_path / "tiny", arrays_of(shapes), vocab_size=49152)
    metadata = open_gguf(smollm2_path).metadata
    (folder / "tokenizer.json").write_text(smollm2_json(metadata))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
    pack_file(folder, "q8_0", tmp_path / "out.gguf")
    made = open_gguf(tmp_path / "out.gguf").metadata
    assert made.text("tokenizer.ggml.pre") == "smollm"
    assert made.byte_strings("tokenizer.ggml.merges") == metadata.byte_strings("tokenizer.ggml.merges")
    hf = HfTokenizer.from_files(read_text_side(folder, folder / "config.json", 49152))
    ours, theirs = Tokenizer.from_metadata(made), Tokenizer.from_metadata(metadata)
    with LlamaCppTokens(tmp_path / "out.gguf") as oracle:
        for text in mixed_texts(11, 300):
            ids = hf.encode(text, add_special=True, parse_special=True)
            assert ours.encode(text, add_special=True, parse_special=True) == ids, text
            assert theirs.encode(text, add_special=True, parse_special=True) == ids, text
            if "\0" not in text:
                assert oracle.encode(text, add_special=True, parse_special=True) == ids, text
    assert ours.end_ids == hf.end_ids
