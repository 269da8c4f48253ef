"""formats.gguf_metadata: getters that name the key, what was wanted and what was found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipo.base.errors import FileChanged, MalformedFile, ModelNotFound
from pipo.formats.gguf import open_gguf
from pipo.formats.gguf_metadata import ValueType
from tests.support.gguf_bytes import STRING, GgufBytes, array_key, small_llama, string, write


def test_typed_getters_name_key_wanted_and_found(tmp_path: Path) -> None:
    metadata = open_gguf(write(tmp_path, bytes(small_llama()))).metadata
    assert metadata.text("general.architecture") == "llama"
    assert metadata.integer("llama.block_count") == 2
    assert metadata.number("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert metadata.flag("no.such.key") is None and metadata.text("tokenizer.chat_template") is None
    assert "llama.block_count" in metadata and "no.such.key" not in metadata
    with pytest.raises(MalformedFile, match=r"'llama.block_count' is the int 2, wanted a string"):
        metadata.text("llama.block_count")
    with pytest.raises(MalformedFile, match=r"'general.architecture' is a string, wanted an integer"):
        metadata.integer("general.architecture")
    with pytest.raises(MalformedFile, match=r"'tokenizer.ggml.tokens' is an array of 4 STRING, wanted a bool"):
        metadata.flag("tokenizer.ggml.tokens")
    with pytest.raises(MalformedFile, match=r"'llama.block_count' is the int 2, wanted a float"):
        metadata.number("llama.block_count")
    with pytest.raises(MalformedFile, match=r"'no.such.key' is missing, wanted an array"):
        metadata.strings("no.such.key")
    with pytest.raises(MalformedFile, match="wanted an array of numbers"):
        metadata.array("tokenizer.ggml.tokens")
    with pytest.raises(MalformedFile, match="wanted an array of strings"):
        metadata.strings("tokenizer.ggml.scores")


def test_strings_that_are_not_utf8_can_be_had_as_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(GgufBytes([array_key("tokens", STRING, [string(b"ok"), string(b"\xff")])])))
    metadata = open_gguf(path).metadata
    assert metadata.byte_strings("tokens") == [b"ok", b"\xff"]
    with pytest.raises(MalformedFile, match=r"'tokens' has a string that is not UTF-8: b'\\xff'"):
        metadata.strings("tokens")


def test_a_bool_array_holds_only_0_and_1(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(GgufBytes([array_key("flags", ValueType.BOOL, [b"\0", b"\1", b"\2"])])))
    with pytest.raises(MalformedFile, match="'flags' has a bool of 2"):
        open_gguf(path).metadata.array("flags")


def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(small_llama()))
    metadata = open_gguf(path).metadata
    os.utime(path, ns=(0, 0))
    with pytest.raises(FileChanged, match=r"wanted \d+ bytes"):
        metadata.strings("tokenizer.ggml.tokens")
    path.unlink()
    with pytest.raises(ModelNotFound):
        metadata.array("tokenizer.ggml.scores")
