"""The same ids as transformers, and the same text back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipo.formats.gguf import open_gguf
from pipo.formats.hf_text import read_text_side
from pipo.model_file import ModelFile
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.tokenizer import Tokenizer
from tests.support.hf_bytes import write_folder
from tests.support.hf_folders import edit_json
from tests.support.texts import mixed_texts
from tests.support.tokenizer_files import ENGINES, smollm2_json, write_engine

_SEED = 20261128
_SPECIAL_CASES = (
    "", " ", "  ", "\n", "<|im_start|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_start|>", "<|im_start|> b",
    "<|im_start|><|im_start|>", "<|im_<|im_start|>start|>", "<|im_end|", "<s>", "</s>x", "<s> x</s>", "<unk>", "<0x41>",
    "<tool_call>{}", "a naïve b", "naïveté", "e\u0301", "\u00e9", "ﬁ", "a" * 3000, " " * 70, "\n" * 30, "1" * 40,
    "▁▁ ▁", "\x00", "\x7f", "\ufeffBOM", "\U00040000x", "<|end|> \n x", "<|user|>\nx", "  lead", "trail  ",
)  # fmt: skip


def opened(folder: Path, vocab_size: int) -> HfTokenizer:
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": 2}))
    return HfTokenizer.from_files(read_text_side(folder, folder / "config.json", vocab_size))


def assert_same(ours: HfTokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        for add_special in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special)
            assert ours.encode(text, add_special=add_special, parse_special=True) == ids, f"{text=} {add_special=}"
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, add_special=False, parse_special=False) == plain, f"{text=}"
        for found in (ids, plain):
            want = theirs.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            got = ours.decode(found)
            assert got == want or "\ufffd" in want, f"{text=} {found=}"


@pytest.mark.parametrize("name", ENGINES)
def test_the_ids_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_engine(tmp_path, name)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert_same(opened(folder, len(theirs)), theirs, [*_SPECIAL_CASES, *mixed_texts(_SEED, 400)])


def test_smollm2_has_the_ids_of_transformers_and_of_its_gguf(smollm2_path: Path, tmp_path: Path) -> None:
    metadata = open_gguf(smollm2_path).metadata
    (tmp_path / "tokenizer.json").write_text(smollm2_json(metadata))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = [*_SPECIAL_CASES, *mixed_texts(_SEED, 1000)]
    ours, gguf = opened(tmp_path, 49152), Tokenizer.from_metadata(metadata)
    assert_same(ours, AutoTokenizer.from_pretrained(tmp_path), texts)
    for text in texts:
        ids = gguf.encode(text, add_special=True, parse_special=True)
        assert ours.encode(text, add_special=True, parse_special=True) == ids, f"{text=}"
        assert ours.decode(ids) == gguf.decode(ids), f"{text=}"
    assert ours.special_ids.bos == gguf.special_ids.bos and ours.end_ids >= gguf.end_ids
    assert ours.longest_token_bytes >= gguf.longest_token_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "gemma", "unigram"])
def test_text_comes_out_as_its_characters_are_whole(name: str, tmp_path: Path) -> None:
    tokenizer = opened(write_engine(tmp_path, name), 2000)
    for text in ("the 👍🏽 tide é", "naïve привет 你好"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        detokenizer = tokenizer.detokenizer([])
        pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
        whole = tokenizer.decode(ids)
        assert "".join(pieces) == whole
        if name != "unigram":  # which has no token for most of these
            assert whole == text and not any("\ufffd" in piece for piece in pieces)


_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_conversation_has_the_ids_of_transformers(tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template=_TEMPLATE)
    messages = [{"role": "user", "content": " hello there "}, {"role": "assistant", "content": "yes"}]
    want = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ModelFile(tmp_path).encode_chat(messages) == list(want)
