"""Embedding rows: which are read, which are still there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.compute.dequantise import Dequantiser
from pipo.compute.ggml import Library
from pipo.pipeline import embedding
from pipo.pipeline.embedding import Embedding, embedding_bytes
from pipo.transfer.handle import Handle

WIDTH, VOCABULARY = 4, 50
TABLE = np.arange(VOCABULARY * WIDTH, dtype=np.float32).reshape(VOCABULARY, WIDTH)
SPEC = TensorSpec("token_embd.weight", TensorType.F32, (WIDTH, VOCABULARY), Extent(FileIdx(0), 0, TABLE.nbytes))


class Reader:
    """Gives rows of the table, and remembers which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def submit_rows(self, extents: Sequence[Extent], out: memoryview) -> Handle:
        rows = [extent.offset // TABLE[0].nbytes for extent in extents]
        self.asked += rows
        out[:] = TABLE[rows].tobytes()
        handle = Handle("rows", num_bytes=out.nbytes, num_chunks=1, submitted_s=0.0)
        handle.begin_chunk(0.0)
        handle.end_chunk(0.0, None)
        return handle


@pytest.fixture(scope="module")
def lib() -> Library:
    return ggml.load()


@pytest.fixture
def reader() -> Reader:
    return Reader()


def made(lib: Library, reader: Reader, max_tokens: int = 8) -> Embedding:
    return Embedding(SPEC, reader, lambda handle: handle.wait(0), Dequantiser(lib, TensorType.F32), max_tokens)


def gathered(rows: Embedding, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    out = np.zeros((len(tokens), WIDTH), np.float32)
    rows.gather(tokens, out, None)
    return out


def test_a_row_is_read_once(lib: Library, reader: Reader) -> None:
    rows = made(lib, reader)
    for tokens in ([3, 9, 3], [9], [4, 3]):
        np.testing.assert_array_equal(gathered(rows, tokens), TABLE[tokens])
    assert reader.asked == [3, 9, 4]


def test_the_least_recently_used_row_goes(lib: Library, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "RECENT_ROWS", 3)
    rows = made(lib, reader)
    for tokens in ([1], [2], [3], [1], [4], [1], [2]):
        np.testing.assert_array_equal(gathered(rows, tokens), TABLE[tokens])
    assert reader.asked == [1, 2, 3, 4, 2]


def test_more_tokens_than_are_kept(lib: Library, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that must go for others of the same call are used before they go."""
    monkeypatch.setattr(embedding, "RECENT_ROWS", 2)
    rows = made(lib, reader)
    for tokens in ([1, 2], [5, 6, 1, 7, 2, 8], [8, 7, 1]):
        np.testing.assert_array_equal(gathered(rows, tokens), TABLE[tokens])
    assert reader.asked == [1, 2, 5, 6, 7, 8, 1]


def test_bytes_are_those_of_the_arrays(lib: Library, reader: Reader) -> None:
    rows = made(lib, reader, max_tokens=8)
    assert embedding_bytes(SPEC, 8) == rows._raw.nbytes + rows._recent._rows.nbytes
