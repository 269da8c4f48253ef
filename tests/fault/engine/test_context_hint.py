"""Where a context is too long for the budget, the one that is named fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.random_model import write_random_model
from pipo.base.errors import OverBudget
from tests.support.engines import smallest_ram_bytes, start_engine

MORE_BYTES = 5 << 20  # the narrowest read buffers are larger than those of tests


@pytest.mark.parametrize("num_sequences", [1, 4, 8])
def test_the_context_that_is_named_fits(num_sequences: int, tmp_path: Path) -> None:
    path, settings = tmp_path / "m.gguf", {"num_sequences": num_sequences, "cache_type_k": "f32", "cache_type_v": "f32"}
    write_random_model(path, "smoke", "q4_0")
    limit = smallest_ram_bytes(path, context_tokens=600, **settings) + MORE_BYTES
    with pytest.raises(OverBudget) as refused:
        start_engine(path, ram_bytes=limit, context_tokens=2048, **settings)
    named = re.search(r"-c (\d+) fits", refused.value.hint or "")
    assert named, refused.value.hint
    context = int(named[1])
    start_engine(path, ram_bytes=limit, context_tokens=context, **settings).close()
