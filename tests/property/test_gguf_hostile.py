"""GGUF from strangers: one refusal per way to be wrong, and for anything else a parse or a ModelError, soon."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.base.errors import MalformedFile, ModelError, UnsupportedModel
from pipo.base.tensor_type import TensorType
from pipo.base.units import GIB, MIB
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.gguf import MAX_SHARDS, MAX_TENSORS, open_gguf
from pipo.formats.gguf_header import MAX_ARRAY_STRINGS, WINDOW_BYTES
from pipo.formats.gguf_metadata import MAX_KEYS, ArrayRef, GgufMetadata, ValueType
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    Q4_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    GgufBytes,
    array_key,
    count_key,
    key,
    llama_keys,
    rich_llama,
    small_llama,
    string,
    tensor,
    text_key,
    u32,
    u64,
    write,
)

MAX_U64 = 2**64 - 1
CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus" / "gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def explore(path: Path) -> None:
    """Open, then read every array."""
    read_arrays(open_checkpoint(path).metadata)


def read_arrays(metadata: GgufMetadata) -> None:
    for name in metadata:
        ref = metadata.get(name)
        if isinstance(ref, ArrayRef):
            items = metadata.byte_strings(name) if ref.element_type is ValueType.STRING else metadata.array(name)
            assert len(items) == ref.count


def one_key(raw: bytes) -> GgufBytes:
    return GgufBytes([raw])


def one_tensor(raw: bytes, data: bytes = bytes(4096)) -> GgufBytes:
    return GgufBytes([], [raw], data)


def alignment(value: int) -> GgufBytes:
    return one_key(count_key("general.alignment", value))


TWICE = tensor("a", (8,))
NEEDS = r"needs \d+ bytes at offset \d+, the file ends at"

MALFORMED = {
    # counts
    "key count beyond the file": (GgufBytes(num_keys=50), "claims 50 keys of at least 14 bytes at offset 24"),
    "key count of 2^64 - 1": (GgufBytes(num_keys=MAX_U64), f"claims {MAX_U64} keys, at most {MAX_KEYS}"),
    "fewer keys than claimed": (GgufBytes([count_key("a", 1)], data=bytes(64), num_keys=2), "is named ''"),
    "tensor count beyond the file": (GgufBytes(num_tensors=50), "claims 50 tensors of at least 33 bytes"),
    "tensor count of 2^64 - 1": (GgufBytes(num_tensors=MAX_U64), f"claims {MAX_U64} tensors, at most {MAX_TENSORS}"),
    # keys
    "key without a name": (one_key(count_key("", 1)), "key 1 of 1 is named ''"),
    "key with a zero byte": (one_key(count_key("a\0b", 1)), "is named 'a.x00b'"),
    "key that is not UTF-8": (one_key(key(b"a\xff", UINT32, u32(1))), "a key that is not UTF-8: byte 1"),
    "key longer than 65535 bytes": (one_key(count_key("a" * 65536, 1)), "a key of 65536 bytes, at most 65535"),
    "key length beyond the file": (one_key(u64(300) + b"a" * 40), NEEDS),
    "key length of 2^64 - 1": (one_key(u64(MAX_U64) + bytes(32)), f"a key of {MAX_U64} bytes"),
    "key twice": (GgufBytes([count_key("a", 1), count_key("a", 1)]), "key 'a' is there twice"),
    # values
    "unknown value type": (one_key(key("a", 13, bytes(8))), "key 'a' has value type 13"),
    "value type of 2^32 - 1": (one_key(key("a", 2**32 - 1, bytes(8))), "key 'a' has value type 4294967295"),
    "bool of 2": (one_key(key("a", BOOL, b"\2")), "key 'a' is a bool of 2, wanted 0 or 1"),
    "string that is not UTF-8": (one_key(text_key("a", b"\xc3\x28")), "key 'a' has a value that is not UTF-8"),
    "string beyond the file": (one_key(key("a", STRING, u64(4096) + b"x")), f"key 'a' {NEEDS}"),
    "string of 2^64 - 1": (one_key(key("a", STRING, u64(MAX_U64))), f"key 'a' has a value of {MAX_U64} bytes"),
    "value cut short": (GgufBytes([key("a", UINT64, b"1234")], alignment=1), f"key 'a' {NEEDS}"),
    # arrays
    "unknown element type": (one_key(key("a", ARRAY, u32(99) + u64(1))), "key 'a' has value type 99"),
    "numbers beyond the file": (one_key(array_key("a", UINT32, [], count=1000)), "key 'a' claims 1000 numbers"),
    "numbers: 2^62 of 4 bytes": (one_key(array_key("a", UINT32, [], count=2**62)), f"key 'a' claims {2**62} numbers"),
    "strings beyond the file": (one_key(array_key("a", STRING, [], count=1000)), "key 'a' claims 1000 strings"),
    "strings: 2^61": (one_key(array_key("a", STRING, [], count=2**61)), f"key 'a' claims {2**61} strings"),
    "one string of an array too long": (one_key(array_key("a", STRING, [string("b"), u64(2**40)])), f"key 'a' {NEEDS}"),
    "one string of 2^64 - 1": (one_key(array_key("a", STRING, [u64(MAX_U64), bytes(9)])), f"key 'a' {NEEDS}"),
    # alignment
    **{
        f"alignment {value}": (alignment(value), f"'general.alignment' is {value}, wanted a power of two from 8")
        for value in (0, 1, 4, 24, 33, 2 * MIB, 2**32 - 1)
    },
    "alignment that is a string": (one_key(text_key("general.alignment", "32")), "a string, wanted an integer"),
    # tensors
    "tensor without a name": (one_tensor(tensor("", (8,))), "tensor 1 of 1 is named ''"),
    "tensor with a zero byte": (one_tensor(tensor("a\0", (8,))), "is named 'a.x00'"),
    "tensor name of 64 bytes": (one_tensor(tensor("a" * 64, (8,))), "has a name of 64 bytes, at most 63"),
    "tensor name that is not UTF-8": (one_tensor(tensor(b"\xff", (8,))), "a name that is not UTF-8"),
    "tensor twice": (GgufBytes([], [TWICE, TWICE], bytes(64)), "tensor 'a' is there twice"),
    "no dimensions": (one_tensor(tensor("a", ())), "tensor 'a' has 0 dimensions, wanted 1 to 4"),
    "five dimensions": (one_tensor(tensor("a", (1,) * 5)), "tensor 'a' has 5 dimensions"),
    "2^32 - 1 dimensions": (one_tensor(tensor("a", (1,), num_dims=2**32 - 1)), "has 4294967295 dimensions"),
    "a dimension of 0": (one_tensor(tensor("a", (8, 0))), r"tensor 'a' has shape \(8, 0\), with a dimension of 0"),
    "elements beyond 2^63": (one_tensor(tensor("a", (2**32, 2**31))), r"more than 2\^63 - 1 elements"),
    "elements wrapping to 4": (one_tensor(tensor("a", (2**33, 2**33, 1))), r"more than 2\^63 - 1 elements"),
    "a negative dimension": (one_tensor(tensor("a", (MAX_U64 - 7,))), r"more than 2\^63 - 1 elements"),
    "bytes beyond 2^63": (one_tensor(tensor("a", (2**62,))), r"more than 2\^63 - 1 bytes"),
    "a row that is not whole blocks": (one_tensor(tensor("a", (48, 2), Q4_0)), "has rows of 48, Q4_0 wants a multiple"),
    "offset not aligned": (one_tensor(tensor("a", (8,), F32, 8)), "starts at 8 of the data, wanted a multiple of 32"),
    "offset beyond the file": (one_tensor(tensor("a", (8,), F32, 1 << 20)), "tensor 'a' takes bytes .* ends at"),
    "offset of almost 2^64": (one_tensor(tensor("a", (8,), F32, 2**64 - 32)), "tensor 'a' takes bytes"),
    "data cut short": (one_tensor(tensor("a", (8,)), bytes(31)), "tensor 'a' takes bytes 64 to 96, .* ends at 95"),
    "tensor table cut short": (GgufBytes([], [tensor("a", (8,))[:-4]], alignment=1), "claims 1 tensors of at least"),
    "tensors that overlap": (
        GgufBytes([], [tensor("a", (16,)), tensor("b", (8,), F32, 32)], bytes(64)),
        "tensor 'b' starts at byte .*, where 'a' lies",
    ),
    "tensors in the same place": (GgufBytes([], [TWICE, tensor("b", (8,))], bytes(64)), "where 'a' lies"),
}
UNSUPPORTED = {
    "nested arrays": (one_key(key("a", ARRAY, u32(ARRAY) + u64(1))), "key 'a' is an array of arrays"),
    **{
        f"tensor type {number}": (one_tensor(tensor("a", (256,), number)), f"tensor 'a' has type {number}")
        for number in (4, 5, 31, 32, 33, 36, 37, 38, max(TensorType) + 1, 2**32 - 1)
    },
}


def test_the_base_of_all_these_is_valid(folder: Path) -> None:
    explore(write(folder, bytes(small_llama())))
    explore(write(folder, bytes(rich_llama())))
    assert len(open_gguf(write(folder, bytes(one_tensor(TWICE)))).tensors) == 1


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(folder: Path, case: str) -> None:
    file, message = MALFORMED[case]
    path = write(folder, bytes(file))
    with pytest.raises(MalformedFile, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(folder: Path, case: str) -> None:
    file, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModel, match=message):
        open_gguf(write(folder, bytes(file)))


def test_what_fuzzing_found_once() -> None:
    for path in CORPUS.glob("*.bin"):
        with pytest.raises(ModelError):
            explore(path)


def test_every_truncation_is_refused(folder: Path) -> None:
    raw = bytes(small_llama())
    path = write(folder, raw)
    header_bytes = len(raw) - len(small_llama().data)
    for length in (*range(len(raw) - 1, header_bytes, -97), *range(header_bytes, -1, -1)):
        os.truncate(path, length)
        with pytest.raises(MalformedFile):
            open_gguf(path)


# Files built to cost time or memory. All are sparse: they take no room on the disk.


def bomb(folder: Path, head: GgufBytes, num_bytes: int) -> Path:
    path = write(folder, bytes(head), "bomb.gguf")
    with path.open("r+b") as file:
        file.truncate(num_bytes)
    return path


BOMBS = {
    "a million empty strings too many": (
        one_key(array_key("a", STRING, [], count=MAX_ARRAY_STRINGS + 1)),
        f"claims {MAX_ARRAY_STRINGS + 1} strings, a header may have",
    ),
    "empty strings to the file's end": (
        one_key(array_key("a", STRING, [], count=GIB // 2)),
        "claims 536870912 strings",
    ),
    "a string of 2 GiB": (one_key(key("a", STRING, u64(2 * GIB))), "has a value of 2147483648 bytes, at most 67108863"),
    "two strings of 48 MiB": (
        GgufBytes([text_key("a", bytes(48 * MIB)), key("b", STRING, u64(48 * MIB))]),
        "key 'b' has a value of 50331648 bytes, at most 167",
    ),
    "numbers of 2 GiB": (one_key(array_key("a", UINT8, [], count=2 * GIB)), "claims 2147483648 numbers"),
    "a string of an array of 2 GiB": (one_key(array_key("a", STRING, [u64(2 * GIB)])), "a header may take 256.0 MiB"),
    "all keys and no name": (GgufBytes(num_keys=MAX_KEYS), "is named ''"),
    "all tensors and no name": (GgufBytes(num_tensors=MAX_TENSORS), "is named ''"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(folder: Path, case: str) -> None:
    head, message = BOMBS[case]
    path = bomb(folder, head, 4 * GIB)
    tracemalloc.start()
    begun_s = time.monotonic()
    with pytest.raises(MalformedFile, match=message):
        open_gguf(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < (128 if "48 MiB" in case else 1) * MIB
    assert time.monotonic() - begun_s < 5


def test_strings_far_apart_are_not_read(folder: Path) -> None:
    """Strings longer than the window are stepped over: 250 MiB of them cost 500 reads of one window at most."""
    lengths = [MIB] * 250
    path = write(folder, bytes(24), "far.gguf")
    with path.open("r+b") as file:
        file.write(bytes(one_key(array_key("a", STRING, [], count=len(lengths))))[: 24 + 8 + 1 + 4 + 4 + 8])
        for length in lengths:
            file.write(u64(length))
            file.seek(length, 1)
        file.truncate(file.tell())
    tracemalloc.start()
    assert open_gguf(path).metadata.array_ref("a").count == 250
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * WINDOW_BYTES


def test_too_many_shards_are_refused_before_looking_for_them(folder: Path) -> None:
    keys = [count_key("split.no", 0), count_key("split.count", MAX_SHARDS + 1), count_key("split.tensors.count", 1)]
    with pytest.raises(MalformedFile, match="do not make a shard"):
        open_gguf(write(folder, bytes(GgufBytes(keys)), f"m-00001-of-{MAX_SHARDS + 1:05}.gguf"))


# Anything


INTERESTING = (0, 1, 2, 7, 8, 31, 32, 63, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, MAX_U64)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def mutated(draw: st.DrawFn, raw: bytes) -> bytes:
    """`raw` with up to four changes: bytes and integers replaced, parts removed, repeated, inserted; its end cut."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        change = draw(st.sampled_from(("byte", "u32", "u64", "remove", "repeat", "insert", "cut")))
        if change == "byte":
            changed[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif change in ("u32", "u64"):
            width = 4 if change == "u32" else 8
            value = draw(st.sampled_from(INTERESTING)) & (256**width - 1)
            changed[at : at + width] = value.to_bytes(width, "little")
        elif change == "cut":
            del changed[at:]
        else:
            part = bytes(changed[at : at + draw(st.integers(1, 40))])
            inserted = {"remove": b"", "repeat": part * 2, "insert": draw(st.binary(max_size=9)) + part}[change]
            changed[at : at + len(part)] = inserted
    return bytes(changed)


@settings(max_examples=600, deadline=2000)
@given(mutated(bytes(small_llama())[:700]) | mutated(bytes(small_llama())) | mutated(bytes(rich_llama())))
def test_mutations_parse_or_raise_a_model_error(folder: Path, raw: bytes) -> None:
    path = write(folder, raw)
    try:
        explore(path)
    except ModelError as error:
        assert str(path) in str(error)


def split_keys(idx: int) -> list[bytes]:
    return [count_key("split.no", idx), count_key("split.count", 2), count_key("split.tensors.count", 2)]


FIRST_SHARD = bytes(GgufBytes([*split_keys(0), *llama_keys()], [tensor("a", (8,))], bytes(32)))
SECOND_SHARD = bytes(GgufBytes(split_keys(1), [tensor("b", (8,))], bytes(32)))


@settings(max_examples=150, deadline=2000)
@given(st.just(FIRST_SHARD) | mutated(FIRST_SHARD), mutated(SECOND_SHARD), st.booleans())
def test_mutated_shards_parse_or_raise_a_model_error(folder: Path, first: bytes, second: bytes, swap: bool) -> None:
    paths = [write(folder, first, "m-00001-of-00002.gguf"), write(folder, second, "m-00002-of-00002.gguf")]
    try:
        explore(paths[swap])
    except ModelError as error:
        assert str(folder) in str(error)


@settings(max_examples=200, deadline=2000)
@given(st.binary(max_size=200), st.booleans())
def test_noise_is_refused(folder: Path, noise: bytes, starts_well: bool) -> None:
    head = b"GGUF" + u32(3) + u64(1) + u64(1) if starts_well else b""
    with pytest.raises(ModelError):
        explore(write(folder, head + noise))


SCALARS = (
    st.builds(lambda v: (UINT32, u32(v), v), st.integers(0, 2**32 - 1))
    | st.builds(lambda v: (UINT64, u64(v), v), st.integers(0, MAX_U64))
    | st.builds(lambda v: (STRING, string(v), v), NAMES)
    | st.builds(lambda v: (BOOL, bytes([v]), v), st.booleans())
)


@st.composite
def tensor_tables(draw: st.DrawFn) -> tuple[list[bytes], dict[str, tuple[TensorType, tuple[int, ...], int]], int]:
    """Encoded tensors in any order of data with gaps, what they are, and the bytes of data they need."""
    table: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    offset = 0
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        type_ = draw(st.sampled_from(TensorType))
        blocks, *rest = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        shape = (blocks * type_.block_elems, *rest)
        table[name] = (type_, shape, offset)
        offset += -(-type_.nbytes(shape) // 32) * 32 + 32 * draw(st.integers(0, 2))
    order = draw(st.permutations(list(table)))
    return [tensor(name, table[name][1], table[name][0], table[name][2]) for name in order], table, offset


@settings(max_examples=150, deadline=2000)
@given(st.dictionaries(NAMES.map(lambda name: f"t.{name}"), SCALARS, max_size=6), tensor_tables())
def test_what_is_written_is_read(
    folder: Path,
    scalars: dict[str, tuple[int, bytes, int | str | bool]],
    tensors: tuple[list[bytes], dict[str, tuple[TensorType, tuple[int, ...], int]], int],
) -> None:
    encoded, table, data_bytes = tensors
    keys = [key(name, value_type, payload) for name, (value_type, payload, _) in scalars.items()]
    raw = bytes(GgufBytes(keys, encoded, bytes(data_bytes)))
    opened = open_gguf(write(folder, raw))
    assert dict(opened.metadata.entries) == {name: value for name, (_, _, value) in scalars.items()}
    data_start = len(raw) - data_bytes
    found = {t.name: (t.type, t.shape, t.extent.offset - data_start) for t in opened.tensors.values()}
    assert found == table
