"""formats.gguf against the `gguf` package: same keys, arrays, tensors and offsets; shards; what it costs."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipo.base.errors import FileChanged, MalformedFile, ModelNotFound, ReadFailed, UnsupportedModel
from pipo.base.tensor_type import TensorType
from pipo.base.units import GIB, MIB
from pipo.formats.gguf import Gguf, open_gguf
from pipo.formats.gguf_header import WINDOW_BYTES, HeaderReader, read_at
from pipo.formats.gguf_metadata import ArrayRef, ValueType
from tests.support.gguf_bytes import (
    STRING,
    UINT64,
    GgufBytes,
    array_key,
    count_key,
    small_llama,
    string,
    tensor,
    text_key,
    u32,
    u64,
)

Write = Callable[[gguf.GGUFWriter], None]

# Q8_1 is for activations and in no file. ggml made its d and s halves, 36 bytes; the package still says 40.
GGUF_TYPES = [type_ for type_ in gguf.GGMLQuantizationType if type_.name != "Q8_1"]


def write_gguf(path: Path, fill: Write, *, split_max_tensors: int = 0, small_first_shard: bool = False) -> Path:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors, small_first_shard=small_first_shard)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_scalars(writer: gguf.GGUFWriter) -> None:
    writer.add_uint8("t.u8", 255)
    writer.add_int8("t.i8", -128)
    writer.add_uint16("t.u16", 65535)
    writer.add_int16("t.i16", -32768)
    writer.add_uint32("t.u32", 2**32 - 1)
    writer.add_int32("t.i32", -(2**31))
    writer.add_uint64("t.u64", 2**64 - 1)
    writer.add_int64("t.i64", -(2**63))
    writer.add_float32("t.f32", 0.1)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.yes", True)
    writer.add_bool("t.no", False)
    writer.add_string("t.text", "naïve 🜁\n")


def add_arrays(writer: gguf.GGUFWriter) -> None:
    writer.add_array("t.strings", ["", "a", "ⵣ" * 100, "b" * 300_000, "c"])
    writer.add_array("t.ints", [-1, 0, 2**31 - 1])
    writer.add_array("t.floats", [0.5, -1e30])
    writer.add_array("t.bools", [True, False, True])
    writer.add_array("t.bytes", b"\x00\xff")
    writer.add_key_value("t.u64s", [2**64 - 1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64)


def add_tensors(writer: gguf.GGUFWriter) -> None:
    for number, type_ in enumerate(GGUF_TYPES):
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        rows, columns = number % 3 + 1, 2 * block
        raw = np.zeros((rows, columns // block * block_bytes), dtype=np.uint8)
        writer.add_tensor(f"blk.{number}.{type_.name}", raw, raw_dtype=type_)
    writer.add_tensor("four.dims", np.zeros((2, 3, 5, 7), dtype=np.float32))
    writer.add_tensor("one.dim", np.zeros(1, dtype=np.float32))


def add_everything(writer: gguf.GGUFWriter) -> None:
    add_scalars(writer)
    add_arrays(writer)
    add_tensors(writer)


def assert_same_metadata(opened: Gguf, oracle: gguf.GGUFReader) -> None:
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(opened.metadata) == list(fields)
    for name, field in fields.items():
        found, wanted = opened.metadata.get(name), field.contents()
        if not isinstance(found, ArrayRef):
            assert found == wanted and type(found) is type(wanted), name
            continue
        values = opened.metadata.strings(name) if found.element_type == STRING else None
        values = opened.metadata.array(name).tolist() if values is None else values
        assert values == wanted, name
        assert int(found.element_type) == int(field.types[1]) and found.count == len(wanted), name


def assert_same_tensors(opened: Gguf, oracles: Sequence[gguf.GGUFReader]) -> None:
    wanted = {
        t.name: (int(t.tensor_type), tuple(t.shape.tolist()), file_idx, t.data_offset, t.n_bytes)
        for file_idx, oracle in enumerate(oracles)
        for t in oracle.tensors
    }
    found = {
        t.name: (int(t.type), t.shape, t.extent.file_idx, t.extent.offset, t.num_bytes) for t in opened.tensors.values()
    }
    assert found == wanted


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
    assert opened.metadata.chat_template


def test_no_keys_and_no_tensors(tmp_path: Path) -> None:
    opened = open_gguf(write(tmp_path, bytes(GgufBytes())))
    assert list(opened.metadata) == [] and opened.tensors == {}


def test_empty_arrays(tmp_path: Path) -> None:
    opened = open_gguf(write(tmp_path, bytes(GgufBytes([array_key("s", STRING, []), array_key("n", UINT64, [])]))))
    assert opened.metadata.strings("s") == []
    assert opened.metadata.array("n").tolist() == []


# Metadata access


def write(folder: Path, raw: bytes, name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def test_typed_getters_name_key_wanted_and_found(tmp_path: Path) -> None:
    metadata = open_gguf(write(tmp_path, bytes(small_llama()))).metadata
    assert metadata.text("general.architecture") == "llama"
    assert metadata.integer("llama.block_count") == 2
    assert metadata.number("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert metadata.flag("no.such.key") is None and metadata.chat_template is None
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
    monkeypatch.setattr("pipo.formats.gguf.forget_cached", lambda _, num_bytes: forgotten.append(num_bytes))
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


# Shards


def write_shards(folder: Path, *, small_first_shard: bool = False, name: str = "m.gguf") -> list[Path]:
    write_gguf(folder / name, add_everything, split_max_tensors=20, small_first_shard=small_first_shard)
    return sorted(folder.glob(f"{Path(name).stem}-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_any_shard_opens_the_set(tmp_path: Path, small_first_shard: bool) -> None:
    paths = write_shards(tmp_path, small_first_shard=small_first_shard)
    oracles = [gguf.GGUFReader(path) for path in paths]
    assert len(paths) >= 2
    for path in paths:
        opened = open_gguf(path)
        assert opened.files == tuple(paths)
        assert_same_metadata(opened, oracles[0])
        assert_same_tensors(opened, oracles)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, small_first_shard=True)
    paths[0].unlink()
    with pytest.raises(ModelNotFound, match=f"1 of its 3 shards are missing: {paths[0].name}"):
        open_gguf(paths[1])


def split_keys(idx: int, count: int, num_tensors: int) -> list[bytes]:
    return [
        count_key("split.no", idx),
        count_key("split.count", count),
        count_key("split.tensors.count", num_tensors),
    ]


def write_pair(folder: Path, first: GgufBytes, second: GgufBytes) -> Path:
    write(folder, bytes(second), "m-00002-of-00002.gguf")
    return write(folder, bytes(first), "m-00001-of-00002.gguf")


def shard(keys: Sequence[bytes], name: str) -> GgufBytes:
    return GgufBytes(keys, [tensor(name, (8,))], bytes(32))


ONE, TWO = split_keys(0, 2, 2), split_keys(1, 2, 2)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (shard(split_keys(0, 2, 2), "b"), "wanted shard 2 of 2 with 2 tensors in all, found shard 1 of 2"),
        (shard(split_keys(1, 3, 2), "b"), "wanted shard 2 of 2 with 2 tensors in all, found shard 2 of 3"),
        (shard(split_keys(1, 2, 9), "b"), "wanted shard 2 of 2 with 2 tensors in all, found shard 2 of 2 with 9"),
        (shard(TWO, "a"), "tensor 'a' is also in an earlier shard"),
        (GgufBytes(TWO), "its 2 shards hold 1 tensors, split.tensors.count says 2"),
        (
            shard([*TWO, text_key("general.name", "Y")], "b"),
            "key 'general.name' is 'Y', m-00001-of-00002.gguf says 'X'",
        ),
        (shard([], "b"), "m-00002-of-00002.gguf: is named shard 00002 of 00002, key 'split.count' is None"),
    ],
)
def test_a_shard_of_another_model_is_refused(tmp_path: Path, second: GgufBytes, message: str) -> None:
    first = shard([*ONE, text_key("general.name", "X")], "a")
    with pytest.raises(MalformedFile, match=message):
        open_gguf(write_pair(tmp_path, first, second))


def test_a_shard_opened_under_another_number_is_refused(tmp_path: Path) -> None:
    path = write_pair(tmp_path, shard(TWO, "a"), shard(TWO, "b"))
    with pytest.raises(MalformedFile, match=r"holds shard 2 of 2, so its name must end in -00002-of-00002.gguf"):
        open_gguf(path)


def test_a_renamed_shard_is_refused_with_the_name_it_needs(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(shard(ONE, "a")), "renamed.gguf")
    with pytest.raises(MalformedFile, match=r"must end in -00001-of-00002.gguf"):
        open_gguf(path)


@pytest.mark.parametrize(("idx", "count"), [(2, 2), (0, 5000)])
def test_impossible_shard_numbers(tmp_path: Path, idx: int, count: int) -> None:
    path = write(tmp_path, bytes(shard(split_keys(idx, count, 1), "a")))
    with pytest.raises(MalformedFile, match=f"split.no {idx}, split.count {count}"):
        open_gguf(path)


def test_one_shard_of_one_is_a_file_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(shard(split_keys(0, 1, 1), "a")), "m-00001-of-00001.gguf")
    assert open_gguf(path).files == (path,)


# Files that are something else


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
    with pytest.raises(UnsupportedModel, match=r"is a folder[^$]*safetensors are not supported yet"):
        open_gguf(tmp_path)
    write(tmp_path, b"", "inside.gguf")
    with pytest.raises(UnsupportedModel, match=r"is a folder[^$]*hint: name a file in it: inside.gguf"):
        open_gguf(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UnsupportedModel, match="not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")
