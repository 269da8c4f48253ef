"""Files written by the `gguf` package, with everything a GGUF can hold, and what the package reads in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

from pipo.formats.gguf import Gguf
from pipo.formats.gguf_metadata import ArrayRef
from tests.support.gguf_bytes import STRING

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
