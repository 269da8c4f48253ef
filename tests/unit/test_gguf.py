"""formats.gguf against the `gguf` package: same keys, arrays, tensors and offsets."""

from __future__ import annotations

from pathlib import Path

import gguf

from pipo.base.tensor_type import TensorType
from pipo.formats.gguf import open_gguf
from tests.support.gguf_bytes import STRING, UINT64, GgufBytes, array_key, u32, write
from tests.support.gguf_oracle import (
    GGUF_TYPES,
    add_everything,
    add_tensors,
    assert_same_metadata,
    assert_same_tensors,
    write_gguf,
)


def test_tensor_types_are_those_of_gguf() -> None:
    ours = {type_.name: (int(type_), type_.block_elems, type_.block_bytes) for type_ in TensorType}
    theirs = {type_.name: (int(type_), *gguf.GGML_QUANT_SIZES[type_]) for type_ in GGUF_TYPES}
    assert ours.items() >= theirs.items()


def test_everything_as_the_oracle_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", add_everything)
    opened, oracle = open_gguf(path), gguf.GGUFReader(path)
    assert opened.files == (path,)
    assert_same_metadata(opened, oracle)
    assert_same_tensors(opened, [oracle])


def test_custom_alignment(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(4096)
        add_tensors(writer)

    path = write_gguf(tmp_path / "m.gguf", fill)
    opened = open_gguf(path)
    assert all(t.extent.offset % 4096 == 0 for t in opened.tensors.values())
    assert_same_tensors(opened, [gguf.GGUFReader(path)])


def test_version_2(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", add_everything)
    with path.open("r+b") as file:
        file.seek(4)
        file.write(u32(2))
    opened, oracle = open_gguf(path), gguf.GGUFReader(path)
    assert_same_metadata(opened, oracle)
    assert_same_tensors(opened, [oracle])


def test_the_real_file(smollm2_path: Path) -> None:
    opened, oracle = open_gguf(smollm2_path), gguf.GGUFReader(smollm2_path)
    assert_same_metadata(opened, oracle)
    assert_same_tensors(opened, [oracle])
    assert opened.metadata.text("tokenizer.chat_template")


def test_no_keys_and_no_tensors(tmp_path: Path) -> None:
    opened = open_gguf(write(tmp_path, bytes(GgufBytes())))
    assert list(opened.metadata) == [] and opened.tensors == {}


def test_empty_arrays(tmp_path: Path) -> None:
    opened = open_gguf(write(tmp_path, bytes(GgufBytes([array_key("s", STRING, []), array_key("n", UINT64, [])]))))
    assert opened.metadata.strings("s") == []
    assert opened.metadata.array("n").tolist() == []
