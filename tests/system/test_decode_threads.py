"""A plan's threads are what passes compute with, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.random_model import write_random_model
from pipo.base.clock import RealClock
from pipo.base.config import EngineConfig
from pipo.base.trace import NullTracer
from pipo.compute.devices import CpuBackend
from pipo.pipeline.assembly import Assembly
from tests.support.rigs import Rig


@pytest.mark.parametrize(("decode_threads", "expected"), [(None, [2, 2, 2]), (1, [2, 1, 2])])
def test_passes_of_one_token_take_fewer_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode_threads: int | None, expected: list[int]
) -> None:
    write_random_model(tmp_path / "smoke.gguf", "smoke", "q4_0")
    used: list[int] = []
    compute = CpuBackend.compute

    def noting(backend: CpuBackend, graph: int) -> None:
        used.append(backend._count)
        compute(backend, graph)

    monkeypatch.setattr(CpuBackend, "compute", noting)
    with Rig(tmp_path / "smoke.gguf", EngineConfig(threads=2, prefill_chunk=8)) as rig:
        placement = rig.placements(3)[0]
        limit = placement.num_bytes
        assembly = Assembly(rig.blueprint, placement, 256, limit, RealClock(), NullTracer(), decode_threads)
        try:
            per_pass = []
            for start, tokens in ((0, [1, 2, 3]), (3, [4]), (4, [5, 6])):
                used.clear()
                assembly.forward.run(tokens, start, [0])
                per_pass.append(set(used))
        finally:
            assembly.close()
    assert per_pass == [{count} for count in expected]
