"""What a pass is prepared with."""

from __future__ import annotations

import tracemalloc

import numpy as np

from pipo.pipeline.buffers import BufferShape, PassBuffers
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena

SHAPE = BufferShape(hidden_size=8, vocab_size=8, max_tokens=128, num_kv_rows=4096, max_outputs=1)


def test_mask_is_causal_and_made_in_place() -> None:
    with Arena(SHAPE.num_bytes, name="buffers", ledger=Ledger(1 << 30)) as arena:
        place = arena.take(SHAPE.num_bytes)
        buffers = PassBuffers(SHAPE, place)
        tracemalloc.start()
        buffers.prepare(3900, 128, np.zeros(1, np.int32))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        offset = buffers.addresses["mask"] - place.address
        mask = np.frombuffer(place.view, np.float16, 128 * 4096, offset).reshape(128, 4096)
        wanted = np.where(np.arange(4096) <= np.arange(3900, 4028)[:, None], np.float16(0), np.float16(-np.inf))
        np.testing.assert_array_equal(mask, wanted)
        assert peak_bytes < 64 << 10, "temporary arrays are outside the budget"
        del mask, buffers
