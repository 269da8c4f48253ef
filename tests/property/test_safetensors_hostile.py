"""Safetensors from strangers: one refusal per way to be wrong, and for anything else a parse or a ModelError, soon."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipo.base.errors import MalformedFile, ModelError, ModelNotFound, UnsupportedModel
from pipo.base.manifest import FileIdx
from pipo.base.tensor_type import TensorType
from pipo.base.units import GIB, MIB
from pipo.formats.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, MAX_VALUES, Dtype, open_safetensors
from tests.support.safetensors_bytes import entry, file_of, small_file, write_file

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus" / "safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def one(table: object) -> bytes:
    """A file whose only tensor is described as `table`, with 8 bytes of data."""
    return file_of({"a": table}, bytes(8))


def two(first: object, second: object, num_bytes: int = 8) -> bytes:
    return file_of({"a": first, "b": second}, bytes(num_bytes))


GOOD = json.dumps(entry("F32", [2], 0, 8))
DEEP = 100_000

MALFORMED = {
    # the header's length
    "nothing": (b"", "is empty"),
    "a length cut short": (b"\x20\0\0\0", "is not a safetensors file|has 4 bytes"),
    "a length and nothing": (b"\x20" + bytes(7), "has 8 bytes, a header takes more than 8"),
    "a length of 0": (file_of("{", length=0), "has a header of 0 bytes"),
    "a length of 1": (file_of("{", length=1), "has a header of 1 bytes"),
    "a length beyond the file": (file_of("{}", length=3), "has a header of 3 bytes, the file ends at 10"),
    "a length beyond the limit": (
        file_of("{}", length=MAX_HEADER_BYTES + 1),
        f"has a header of {MAX_HEADER_BYTES + 1} bytes, at most 16.0 MiB",
    ),
    "a length of 2^64 - 1": (file_of("{}", length=2**64 - 1), f"has a header of {2**64 - 1} bytes, at most"),
    # JSON
    "a header that is no object": (file_of("[]"), "wanted a header in JSON, found b'\\[\\]'"),
    "a header that is a text": (file_of('"{}"'), "wanted a header in JSON"),
    "a header that begins with a space": (file_of(" {}"), "wanted a header in JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "its header is not UTF-8: byte 2"),
    "UTF-16": (file_of('{"a": 1}'.encode("utf-16-le")), "its header is not JSON"),
    "cut short": (file_of('{"a": {'), "its header is not JSON"),
    "something behind": (file_of("{} {}"), "its header is not JSON: Extra data"),
    "zero bytes behind": (file_of("{}\0\0"), "its header is not JSON"),
    "a NaN": (file_of('{"a": NaN}'), "is not JSON: NaN is no number"),
    "a number of 5000 digits": (file_of('{"a": ' + "1" * 5000 + "}"), "its header is not JSON"),
    "nested": (file_of('{"a": ' + "[" * DEEP + "]" * DEEP + "}"), "its header is not JSON"),
    "a tensor twice": (file_of(f'{{"a": {GOOD}, "a": {GOOD}}}', bytes(8)), "has 'a' twice"),
    "metadata twice": (file_of('{"__metadata__": {}, "__metadata__": {}}'), "has '__metadata__' twice"),
    "a key twice": (file_of('{"a": {"dtype": "F32", "dtype": "F32"}}'), "has 'dtype' twice"),
    # metadata
    "metadata that is a list": (file_of({"__metadata__": []}), "has __metadata__ that is not a table of texts"),
    "metadata with a number": (file_of({"__metadata__": {"a": 1}}), "has __metadata__ that is not a table of texts"),
    # names
    "a tensor without a name": (file_of({"": entry("F32", [2], 0, 8)}, bytes(8)), "a tensor named ''"),
    "a name with a zero byte": (file_of({"a\0": entry("F32", [2], 0, 8)}, bytes(8)), "a tensor named 'a.x00'"),
    "a name that is half a character": (
        file_of(f'{{"\\ud800": {GOOD}}}', bytes(8)),
        r"a tensor named '\\ud800'",
    ),
    "a name of 513 letters": (file_of({"a" * 513: entry("F32", [2], 0, 8)}, bytes(8)), "which is not a name of 1 to"),
    # a tensor's table
    "a tensor that is a number": (one(1), "tensor 'a' has int, wanted"),
    "a tensor that is null": (one(None), "tensor 'a' has NoneType, wanted"),
    "a tensor without a shape": (one({"dtype": "F32", "data_offsets": [0, 8]}), "has 'data_offsets', 'dtype', wanted"),
    "a tensor with a fourth key": (one({**entry("F32", [2], 0, 8), "x": 1}), "tensor 'a' has .*'x', wanted"),
    # shapes
    "a shape that is a number": (one(entry("F32", 2, 0, 8)), "has shape 2, wanted a list"),
    "a negative dimension": (one(entry("F32", [-2], 0, 8)), r"has shape \[-2\], wanted a list"),
    "a dimension with a fraction": (one(entry("F32", [2.0], 0, 8)), r"has shape \[2.0\], wanted a list"),
    "a dimension that is true": (one(entry("F32", [True, 2], 0, 8)), r"has shape \[True, 2\], wanted a list"),
    "a dimension of 2^63": (one(entry("F32", [2**63], 0, 8)), "has shape .*, wanted a list of whole numbers"),
    "nine dimensions": (one(entry("F32", [1] * 9, 0, 4)), "has 9 dimensions, at most 8"),
    "elements beyond 2^63": (one(entry("F32", [2**40, 2**40], 0, 8)), r"more than 2\^63 - 1 bytes"),
    "elements wrapping to 2": (one(entry("F32", [2**32, 2**32, 2**32], 0, 8)), r"more than 2\^63 - 1 bytes"),
    # offsets
    "offsets that are a number": (one({"dtype": "F32", "shape": [2], "data_offsets": 8}), "has data_offsets 8"),
    "one offset": (one({"dtype": "F32", "shape": [2], "data_offsets": [8]}), r"data_offsets \[8\], wanted \[begin"),
    "three offsets": (one({"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}), r"wanted \[begin, end\]"),
    "an end before the begin": (one(entry("F32", [2], 8, 0)), r"data_offsets \[8, 0\], wanted \[begin, end\]"),
    "a negative offset": (one(entry("F32", [2], -8, 0)), "data_offsets .*, wanted a list of whole numbers"),
    "an offset of 2^64": (one(entry("F32", [2], 2**64, 2**64 + 8)), "data_offsets .*, wanted a list of whole numbers"),
    "an offset that is a text": (one(entry("F32", [2], "0", "8")), "data_offsets .*, wanted a list of whole numbers"),
    "too few bytes": (one(entry("F32", [2], 0, 4)), r"takes 4 bytes, F32 of shape \[2\] takes 8"),
    "too many bytes": (one(entry("F32", [1], 0, 8)), r"takes 8 bytes, F32 of shape \[1\] takes 4"),
    "half a byte": (one(entry("F4", [3], 0, 1)), r"takes 1 bytes, F4 of shape \[3\] takes 1.5"),
    # the data
    "data that begins late": (one(entry("F32", [1], 4, 8)), "is the first and starts at byte 4 of the data, not 0"),
    "a hole": (two(entry("F32", [1], 0, 4), entry("F32", [1], 8, 12), 12), "tensor 'b' starts at byte .*'a' before it"),
    "an overlap": (two(entry("F32", [2], 0, 8), entry("F32", [1], 4, 8)), "tensor 'b' starts at byte .*where 'a' lies"),
    "tensors in the same place": (two(entry("F32", [2], 0, 8), entry("F32", [2], 0, 8)), "where 'a' lies"),
    "data cut short": (file_of({"a": entry("F32", [2], 0, 8)}, bytes(7)), "ends at byte .*, its tensors at"),
    "data behind": (file_of({"a": entry("F32", [2], 0, 8)}, bytes(9)), "has 1 bytes behind its last tensor"),
    "data of no tensor": (file_of("{}", bytes(3)), "has 3 bytes behind its last tensor"),
    # other files
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "noise": (b"abcdefghijklmnop", "is not a safetensors file"),
}
UNSUPPORTED = {
    "an unknown type": (one(entry("F128", [1], 0, 8)), "tensor 'a' is of type 'F128', which this pipo does not know"),
    "a type that is a number": (one(entry(4, [2], 0, 8)), "tensor 'a' is of type 4"),
    "a pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "is a Python pickle"),
    "a zip archive": (b"PK\x03\x04" + bytes(40), "is a zip archive"),
}


def test_the_base_of_all_these_is_valid(folder: Path) -> None:
    opened = open_safetensors(write_file(folder, small_file()))
    assert opened.metadata == {"format": "pt"}
    assert {t.name: (t.dtype, t.shape, t.num_bytes) for t in opened.tensors.values()} == {
        "a": (Dtype.F32, (2, 3), 24),
        "b": (Dtype.BF16, (4,), 8),
    }
    assert len(open_safetensors(write_file(folder, one(entry("F32", [2], 0, 8)))).tensors) == 1


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(folder: Path, case: str) -> None:
    raw, message = MALFORMED[case]
    path = write_file(folder, raw)
    with pytest.raises(MalformedFile, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(folder: Path, case: str) -> None:
    raw, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModel, match=message):
        open_safetensors(write_file(folder, raw))


def test_no_file_and_no_regular_file(folder: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_safetensors(folder / "none.safetensors")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsupportedModel, match="not a regular file"):
        open_safetensors(folder / "pipe")


def test_a_length_that_begins_as_a_pickle_does(folder: Path) -> None:
    """640 is b"\\x80\\x02": such a header must not be taken for a pickle, nor one of 35615 for a gzip archive."""
    for length in (640, 640 + 256, 35615):
        text = json.dumps({"a": entry("F32", [2], 0, 8)})
        assert open_safetensors(write_file(folder, file_of(text.ljust(length), bytes(8)))).tensors


def test_spaces_behind_the_header_align_the_data(folder: Path) -> None:
    text = json.dumps({"a": entry("F32", [2], 0, 8)}).ljust(200)
    assert open_safetensors(write_file(folder, file_of(text, bytes(8)))).tensors["a"].offset == 208


def test_a_download_that_has_only_begun_can_be_planned_with(folder: Path) -> None:
    raw = small_file()
    path = write_file(folder, raw[:-32])
    with pytest.raises(MalformedFile, match="ends at byte"):
        open_safetensors(path)
    assert len(open_safetensors(path, header_only=True).tensors) == 2


def test_every_truncation_is_refused(folder: Path) -> None:
    raw = small_file()
    path = write_file(folder, raw)
    for length in range(len(raw) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(MalformedFile):
            open_safetensors(path)


def test_specs_are_in_ggml_terms(folder: Path) -> None:
    path = write_file(folder, small_file())
    spec = open_safetensors(path).tensors["a"].as_spec(path, FileIdx(3), "blk.0.x")
    assert (spec.name, spec.type, spec.shape) == ("blk.0.x", TensorType.F32, (3, 2))
    assert (spec.extent.file_idx, path.read_bytes()[spec.extent.offset :][:24]) == (3, bytes(range(24)))


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("F8_E4M3", [8], "'a' is F8_E4M3, which pipo does not compute with"),
        ("U8", [8], "'a' is U8"),
        ("F64", [], r"'a' has shape \(\), wanted one with elements"),
    ],
)
def test_what_ggml_has_not_is_refused_by_name(folder: Path, dtype: str, shape: list[int], message: str) -> None:
    path = write_file(folder, one(entry(dtype, shape, 0, 8)))
    with pytest.raises(UnsupportedModel, match=message):
        open_safetensors(path).tensors["a"].as_spec(path, FileIdx(0))


# Files built to cost time or memory.

BOMBS = {
    "a header of spaces": (b"{" + b" " * (MAX_HEADER_BYTES - 2) + b"x", "its header is not JSON"),
    "commas": (b'{"a":[' + b"1," * (MAX_HEADER_BYTES // 2 - 8) + b"1]}", "its header has .* values, at most"),
    "objects": (b'{"a":[' + b"{}," * MAX_VALUES + b"1]}", "its header has .* values, at most"),
    "a wide character": ('{"a":"😀' + " " * (MAX_HEADER_BYTES - 16) + '"}', "tensor 'a' has str"),
    "empty lists": (b'{"a":[' + b"[]," * (MAX_VALUES // 2 - 2) + b"1]}", "tensor 'a' has list"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(folder: Path, case: str) -> None:
    header, message = BOMBS[case]
    path = write_file(folder, file_of(header), "bomb.safetensors")
    tracemalloc.start()
    begun_s = time.monotonic()
    with pytest.raises(MalformedFile, match=message):
        open_safetensors(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert peak_bytes < 10 * MAX_HEADER_BYTES
    assert time.monotonic() - begun_s < 5


def test_a_header_of_gigabytes_is_not_read(folder: Path) -> None:
    path = write_file(folder, file_of("{}", length=3 * GIB), "sparse.safetensors")
    os.truncate(path, 4 * GIB)
    tracemalloc.start()
    with pytest.raises(MalformedFile, match=r"at most 16\.0 MiB"):
        open_safetensors(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < MIB


def test_too_many_tensors(folder: Path) -> None:
    empty = json.dumps(entry("U8", [0], 0, 0))
    header = "{" + ",".join(f'"{i}":{empty}' for i in range(MAX_TENSORS + 1)) + "}"
    with pytest.raises(MalformedFile, match=f"has {MAX_TENSORS + 1} tensors, at most"):
        open_safetensors(write_file(folder, file_of(header)))


# Anything


@st.composite
def mutated(draw: st.DrawFn, raw: bytes) -> bytes:
    """`raw` with up to four changes: bytes replaced, parts removed, repeated, inserted; its end cut."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        change = draw(st.sampled_from(("byte", "digit", "remove", "repeat", "insert", "cut")))
        part = bytes(changed[at : at + draw(st.integers(1, 40))])
        if change == "cut":
            del changed[at:]
        elif change in ("byte", "digit"):
            changed[at : at + 1] = draw(st.binary(min_size=1, max_size=1) if change == "byte" else DIGITS)
        else:
            inserted = {"remove": b"", "repeat": part * 2, "insert": draw(st.binary(max_size=9)) + part}[change]
            changed[at : at + len(part)] = inserted
    return bytes(changed)


DIGITS = st.sampled_from([b"0", b"9", b"-", b".", b"e", b"[", b"{", b'"', b","])


def with_length(header: bytes) -> bytes:
    return file_of(header, bytes(32))


@settings(max_examples=400, deadline=2000)
@given(mutated(small_file()) | mutated(small_file()[8:-32]).map(with_length))
def test_mutations_parse_or_raise_a_model_error(folder: Path, raw: bytes) -> None:
    path = write_file(folder, raw)
    try:
        open_safetensors(path)
    except ModelError as error:
        assert str(path) in str(error)


@settings(max_examples=200, deadline=2000)
@given(st.binary(max_size=100), st.booleans())
def test_noise_is_refused(folder: Path, noise: bytes, starts_well: bool) -> None:
    assume(noise.strip() != b"}")  # a header of no tensors is a sound one
    raw = file_of(b"{" + noise) if starts_well else noise
    with pytest.raises(ModelError):
        open_safetensors(write_file(folder, raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=2000)
@given(
    st.dictionaries(
        st.text(max_size=4), st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}) | JSON
    )
)
def test_any_object_parses_or_raises_a_model_error(folder: Path, header: Mapping[str, object]) -> None:
    try:
        open_safetensors(write_file(folder, file_of(header)))
    except ModelError:
        return
    assert not header.keys() - {"__metadata__"}


def test_what_fuzzing_found_once() -> None:
    for path in CORPUS.glob("*.bin"):
        with pytest.raises(ModelError):
            open_safetensors(path)


ARRAYS = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(["float32", "float16", "int8", "int64", "float64"]), st.lists(st.integers(0, 4))).map(
        lambda drawn: np.zeros(drawn[1][:4], drawn[0])
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=2000)
@given(ARRAYS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3))
def test_what_the_reference_writes_is_read(
    folder: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    path = folder / "written.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata)
    opened = open_safetensors(path)
    assert opened.metadata == metadata
    found = {t.name: (t.dtype.name, t.shape, t.num_bytes) for t in opened.tensors.values()}
    names = {"float32": "F32", "float16": "F16", "int8": "I8", "int64": "I64", "float64": "F64"}
    assert found == {name: (names[a.dtype.name], a.shape, a.nbytes) for name, a in arrays.items()}
