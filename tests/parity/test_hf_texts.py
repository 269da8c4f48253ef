"""A tokenizer.json beside a GGUF: files in pieces have the ids of the whole, and two formats of a model compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipo.base.errors import UsageError
from pipo.formats.checkpoint import Checkpoint, open_checkpoint
from pipo.formats.hf_text import HfText
from pipo.model_file import ModelFile
from pipo.text import text_file
from pipo.text.hf_tokenizer import HfTokenizer
from pipo.text.same_vocabulary import check_same_vocabulary
from pipo.text.text_file import encode_file
from tests.parity.test_hf_tokenizer_parity import opened
from tests.support.gguf_bytes import F32, STRING, GgufBytes, array_key, llama_keys, string, tensor, write
from tests.support.hf_bytes import VOCAB, write_folder
from tests.support.texts import mixed_texts
from tests.support.tokenizer_files import ENGINES, write_engine

ALL = 1 << 40
TEXT = "\n".join(mixed_texts(seed=11, count=400))


@pytest.mark.parametrize("name", ENGINES)
def test_a_file_in_pieces_has_the_ids_of_the_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "_LEAST_CHARS", 300)
    monkeypatch.setattr(text_file, "_READ_BYTES", 1001)
    tokenizer = opened(write_engine(tmp_path, name), 2000)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, newline="")
    begin, whole = tokenizer.begin_ids, tokenizer.encode(TEXT, add_special=False, parse_special=False)
    assert list(encode_file(text, tokenizer, ALL)) == [*begin, *whole]
    assert tokenizer.encode("a", add_special=True, parse_special=False)[: len(begin)] == begin


def test_only_the_begin_token_is_put_before_a_text(tmp_path: Path) -> None:
    assert opened(write_engine(tmp_path, "llama2"), 400).begin_ids == [1]
    assert opened(write_engine(tmp_path, "llama3"), 1600).begin_ids == [0]
    assert opened(write_engine(tmp_path, "gpt2"), 400).begin_ids == []


def with_tokens(tokens: Sequence[bytes], tmp_path: Path) -> Checkpoint:
    """A GGUF that has these."""
    named = array_key("tokenizer.ggml.tokens", STRING, [string(token) for token in tokens])
    embedding = tensor("token_embd.weight", (64, len(tokens)), F32, 0)
    file = GgufBytes(llama_keys(tokens=named, scores=None), [embedding], bytes(4 * 64 * len(tokens)))
    return open_checkpoint(write(tmp_path, bytes(file)))


def test_a_folder_compares_with_a_gguf_of_the_same_tokens(tmp_path: Path) -> None:
    """Rows that no token has are named in a GGUF alone."""
    folder = ModelFile(write_folder(tmp_path / "folder")).checkpoint
    assert isinstance(folder.metadata, HfText)
    tokens = HfTokenizer.from_files(folder.metadata).spellings()
    assert len(tokens) == VOCAB and all(tokens[:-1])
    padded = [*tokens[:-1], b"[PAD319]"]
    last_is_missing = replace(folder, metadata=replace(folder.metadata, vocab_size=VOCAB - 1))
    check_same_vocabulary(folder, Path("folder"), with_tokens(tokens, tmp_path), Path("gguf"))
    check_same_vocabulary(last_is_missing, Path("folder"), with_tokens(padded, tmp_path), Path("gguf"))
    other = with_tokens([*tokens[:7], b"other", *tokens[8:]], tmp_path)
    with pytest.raises(UsageError, match=r"token 7 is .*, wanted 'other'"):
        check_same_vocabulary(folder, Path("folder"), other, Path("gguf"))
    with pytest.raises(UsageError, match="a vocabulary of 320 tokens, gguf one of 319"):
        check_same_vocabulary(folder, Path("folder"), with_tokens(tokens[:-1], tmp_path), Path("gguf"))
