"""What opening a GGUF costs: a window of the header, no mapping; and what a failing disk says."""

from __future__ import annotations

import os
import tracemalloc
from io import FileIO
from pathlib import Path

import pytest

from pipo.base.errors import MalformedFile, ReadFailed
from pipo.base.units import GIB, MIB
from pipo.formats.gguf import open_gguf
from pipo.formats.gguf_header import WINDOW_BYTES, HeaderReader, read_at
from tests.support.gguf_bytes import STRING, GgufBytes, array_key, string, tensor, write
from tests.support.gguf_oracle import add_everything, write_gguf


def test_a_large_vocabulary_costs_no_memory_to_open(tmp_path: Path) -> None:
    num_tokens = 100_000
    items = b"".join(string(f"token {idx}") for idx in range(num_tokens))
    path = write(tmp_path, bytes(GgufBytes([array_key("tokens", STRING, [items], count=num_tokens)])))
    tracemalloc.start()
    metadata = open_gguf(path).metadata
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    assert metadata.strings("tokens")[-1] == "token 99999"


def test_only_the_header_is_read_and_then_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forgotten: list[int] = []

    def count_read(file: FileIO, path: Path, offset: int, num_bytes: int) -> bytes:
        read.append(num_bytes)
        return read_at(file, path, offset, num_bytes)

    monkeypatch.setattr("pipo.formats.gguf_header.read_at", count_read)
    monkeypatch.setattr("pipo.formats.gguf.forget_cached", lambda _fd, _offset, num_bytes: forgotten.append(num_bytes))
    path = write(tmp_path, bytes(GgufBytes([], [tensor("a", (GIB // 4,))])))
    os.truncate(path, 2 * GIB)
    assert open_gguf(path).tensors["a"].num_bytes == GIB
    assert read == [WINDOW_BYTES] and MIB < forgotten[0] < 2 * MIB


def test_a_disk_that_fails(tmp_path: Path) -> None:
    class FailingFile(FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    path = write(tmp_path, bytes(GgufBytes()))
    with (
        FailingFile(path) as file,
        pytest.raises(ReadFailed, match=r"Input/output error: .* offset 0, wanted 24 bytes"),
    ):
        HeaderReader(file, path, 24).u32()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(GgufBytes()))
    with FileIO(path) as file, pytest.raises(MalformedFile, match="wanted 64 bytes at offset 0, got 32"):
        HeaderReader(file, path, 64).u32()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_file_is_not_mapped(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "unlikely-name.gguf", add_everything)
    opened = open_gguf(path)
    opened.metadata.array("t.ints")
    assert "unlikely-name" not in Path("/proc/self/maps").read_text()
