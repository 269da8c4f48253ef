"""formats.gguf on files that are something else: the refusal names what they are."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pipo.base.errors import MalformedFile, ModelNotFound, UnsupportedModel
from pipo.formats.gguf import open_gguf
from tests.support.gguf_bytes import u32, u64, write


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (b"", MalformedFile, "is empty"),
        (b"GGU", MalformedFile, "is not a GGUF file"),
        (b"hello, world, hello", MalformedFile, r"wanted the magic b'GGUF', found b'hell'"),
        (b"PK\x03\x04" + bytes(60), UnsupportedModel, "zip archive"),
        (b"\x80\x02}q\x00" + bytes(60), UnsupportedModel, "Python pickle"),
        (u64(2000) + b'{"__metadata__":{}}', UnsupportedModel, "safetensors"),
        (b"tjgg" + bytes(60), UnsupportedModel, "predecessor of GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", MalformedFile, "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", MalformedFile, "web page"),
        (b"GGUF" + u32(1) + bytes(60), UnsupportedModel, "GGUF version 1, wanted 2 or 3"),
        (b"GGUF" + u32(4) + bytes(60), UnsupportedModel, "GGUF version 4, wanted 2 or 3"),
        (b"GGUF" + u32(0) + bytes(60), MalformedFile, "version 0"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), UnsupportedModel, "big-endian"),
        (b"GGUF" + u32(3) + u64(0), MalformedFile, "the header takes 24 bytes, the file has 16"),
    ],
)
def test_other_files_are_named(
    tmp_path: Path, raw: bytes, error: type[MalformedFile | UnsupportedModel], message: str
) -> None:
    path = write(tmp_path, raw)
    with pytest.raises(error, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFound, match="cannot be opened"):
        open_gguf(tmp_path / "a\0b.gguf")
    with pytest.raises(ModelNotFound, match="cannot be opened"):
        open_gguf(tmp_path / ("x" * 300))


def test_a_folder_hints_at_the_files_in_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"is a folder without[^$]*config.json[^$]*with safetensors"):
        open_gguf(tmp_path)
    write(tmp_path, b"", "inside.gguf")
    with pytest.raises(UnsupportedModel, match=r"is a folder[^$]*hint: name a file in it: inside.gguf"):
        open_gguf(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UnsupportedModel, match="not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")
