"""What a pass is prepared with."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pipo.pipeline.buffers import BufferShape, PassBuffers
from pipo.pipeline.spans import PassRows, Span
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena

SHAPE = BufferShape(hidden_size=8, vocab_size=8, max_tokens=128, num_kv_rows=4096, max_outputs=1)


def test_mask_is_causal_and_made_in_place() -> None:
    with Arena(SHAPE.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        place = arena.take(SHAPE.num_bytes)
        buffers = PassBuffers(SHAPE, place)
        tracemalloc.start()
        buffers.prepare(PassRows.of([Span(0, 3900, range(128), False)]), np.zeros(1, np.int32))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        offset = buffers.addresses["mask"] - place.address
        mask = np.frombuffer(place.view, np.float16, 128 * 4096, offset).reshape(128, 4096)
        wanted = np.where(np.arange(4096) <= np.arange(3900, 4028)[:, None], np.float16(0), np.float16(-np.inf))
        np.testing.assert_array_equal(mask, wanted)
        assert peak_bytes < 64 << 10, "temporary arrays are outside the budget"
        del mask, buffers


def test_each_sequence_sees_its_own_positions() -> None:
    """A token of sequences 3 and 1, at 258 and at 3, between which 2 takes part in vain: its own two are apart. Rows of
    a class of 512, 1024 rows apart.
    """
    shape = BufferShape(
        hidden_size=8, vocab_size=16, max_tokens=4, num_kv_rows=1024, max_outputs=2, num_sequences=4, mixed_size=8
    )
    rows = PassRows.of([Span(2, 300, [7, 8], False), Span(3, 258, [9], True), Span(1, 3, [6], True)])
    assert rows.token_ids == [6, 9, 7, 8] and rows.last_rows() == {1: 0, 3: 1, 2: 3}
    assert rows.firsts == (1, 2) and rows.num_apart == 2 and rows.num_positions == 302
    with Arena(shape.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        buffers = PassBuffers(shape, arena.take(shape.num_bytes))
        buffers.prepare(rows, np.array([1, 0], np.int32), 1024)
        assert buffers._positions.tolist() == [3, 258, 300, 301]
        assert buffers._kv_rows.tolist() == [3, 2 * 1024 + 258, 300, 301], "from the first row of each group"
        ((_, flat),) = buffers._masks
        mask = flat[: 5 * 512].reshape(5, 512)
        assert [int((row == 0).sum()) for row in mask] == [4, 0, 259, 301, 302]
        assert all(np.isinf(row[int((row == 0).sum()) :]).all() for row in mask)
        nobody = 4
        assert buffers.arrays["mixed_rows"].view(np.int64)[:5].tolist() == [0, nobody, 1, 2, 3]
        assert buffers.arrays["spread"].view(np.int32)[:3].tolist()[::2] == [0, 1]
        used = {name: buffers.used_bytes[name] for name in ("mask", "mixed_rows", "spread", "hidden")}
        assert used == {"mask": 5 * 512 * 2, "mixed_rows": 40, "spread": 20, "hidden": 4 * 32}


def test_layers_that_slide_see_the_newest_tokens() -> None:
    """Three rows that see 2, 3 and 4 of the positions from 0 on, of which 3 are the most."""
    shape = BufferShape(hidden_size=8, vocab_size=16, max_tokens=4, num_kv_rows=256, max_outputs=1, sliding_window=3)
    with Arena(shape.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        buffers = PassBuffers(shape, arena.take(shape.num_bytes))
        buffers.prepare(PassRows.of([Span(0, 1, range(3), False)]), np.zeros(1, np.int32))
        rows = buffers.arrays["local_mask"].view(np.float16)[: 3 * 256].reshape(3, 256)
        assert [np.flatnonzero(row == 0).tolist() for row in rows] == [[0, 1], [0, 1, 2], [1, 2, 3]]
        everything = buffers.arrays["mask"].view(np.float16)[: 3 * 256].reshape(3, 256)
        assert [int((row == 0).sum()) for row in everything] == [2, 3, 4]


@pytest.mark.parametrize("pieces", [[(0, 1000)], [(0, 400), (400, 800), (800, 1000)]])
@pytest.mark.parametrize("num_outputs", [1, 4])
def test_logits_row_by_row_are_those_of_all_at_once(pieces: list[tuple[int, int]], num_outputs: int) -> None:
    """The head puts each of its pieces' results, of all outputs, one after another."""
    shape = BufferShape(hidden_size=8, vocab_size=1000, max_tokens=4, num_kv_rows=256, max_outputs=4)
    with Arena(shape.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        buffers = PassBuffers(shape, arena.take(shape.num_bytes))
        buffers._logits[:] = np.random.default_rng(1).normal(size=4000).astype(np.float32)
        whole = buffers.logits(pieces, num_outputs).copy()
        rows = [row.copy() for row in buffers.logit_rows(pieces, num_outputs)]
        assert whole.shape == (num_outputs, 1000)
        np.testing.assert_array_equal(np.stack(rows), whole)
        del buffers
