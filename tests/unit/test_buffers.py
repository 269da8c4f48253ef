"""What a pass is prepared with."""

from __future__ import annotations

import tracemalloc

import numpy as np

from pipo.pipeline.buffers import BufferShape, PassBuffers, PassRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena

SHAPE = BufferShape(hidden_size=8, vocab_size=8, max_tokens=128, num_kv_rows=4096, max_outputs=1)


def test_mask_is_causal_and_made_in_place() -> None:
    with Arena(SHAPE.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        place = arena.take(SHAPE.num_bytes)
        buffers = PassBuffers(SHAPE, place)
        tracemalloc.start()
        buffers.prepare(PassRows([3900], 128), np.zeros(1, np.int32))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        offset = buffers.addresses["mask"] - place.address
        mask = np.frombuffer(place.view, np.float16, 128 * 4096, offset).reshape(128, 4096)
        wanted = np.where(np.arange(4096) <= np.arange(3900, 4028)[:, None], np.float16(0), np.float16(-np.inf))
        np.testing.assert_array_equal(mask, wanted)
        assert peak_bytes < 64 << 10, "temporary arrays are outside the budget"
        del mask, buffers


def test_each_sequence_sees_its_own_positions() -> None:
    """Two tokens of each of two sequences, at 3 and at 258: rows of a class of 512, 1024 rows apart."""
    shape = BufferShape(hidden_size=8, vocab_size=16, max_tokens=4, num_kv_rows=1024, max_outputs=2)
    with Arena(shape.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        buffers = PassBuffers(shape, arena.take(shape.num_bytes))
        buffers.prepare(PassRows([3, 258], 2), np.array([1, 3], np.int32), 1024)
        assert buffers._positions.tolist() == [3, 4, 258, 259]
        assert buffers._kv_rows.tolist() == [3, 4, 1024 + 258, 1024 + 259]
        ((_, flat),) = buffers._masks
        mask = flat[: 4 * 512].reshape(4, 512)
        assert [int((row == 0).sum()) for row in mask] == [4, 5, 259, 260]
        assert all(not np.isinf(row[: int((row == 0).sum())]).any() for row in mask)


def test_layers_that_slide_see_the_newest_tokens() -> None:
    """Three rows that see 2, 3 and 4 of the positions from 0 on, of which 3 are the most."""
    shape = BufferShape(hidden_size=8, vocab_size=16, max_tokens=4, num_kv_rows=256, max_outputs=1, sliding_window=3)
    with Arena(shape.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        buffers = PassBuffers(shape, arena.take(shape.num_bytes))
        buffers.prepare(PassRows([1], 3), np.zeros(1, np.int32))
        rows = buffers.arrays["local_mask"].view(np.float16)[: 3 * 256].reshape(3, 256)
        assert [np.flatnonzero(row == 0).tolist() for row in rows] == [[0, 1], [0, 1, 2], [1, 2, 3]]
        everything = buffers.arrays["mask"].view(np.float16)[: 3 * 256].reshape(3, 256)
        assert [int((row == 0).sum()) for row in everything] == [2, 3, 4]
