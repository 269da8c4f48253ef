"""Weights live in memory that the context does not fill yet: the logits are the same, bit for bit, at every length."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from mmap import mmap

import numpy as np
import pytest

from bench.random_model import write_random_model
from pipo.base.clock import RealClock
from pipo.base.config import SCHEDULE_NAMES, EngineConfig
from pipo.base.errors import Cancelled
from pipo.base.trace import NullTracer
from pipo.compute.devices import CpuBackend
from pipo.kvcache.cache import ROWS_PER_CLASS, ROWS_PER_PAGE
from pipo.pipeline.assembly import Assembly
from pipo.pipeline.forward import Forward
from pipo.planner.placement import KV_CACHE, Placement, place, smallest_bytes
from tests.support.rigs import FloatArray, Rig, all_logits

CONTEXT, CHUNK = 5 * ROWS_PER_CLASS, 64
PROMPT = [3 + i * 7 % 1000 for i in range(CONTEXT)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """4 blocks: an attention unit has 110 KiB, an MLP 324 KiB; a page of the KV cache takes 512 KiB."""
    path = tmp_path_factory.mktemp("random") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    config = EngineConfig(prefill_chunk=CHUNK, max_outputs=CHUNK, threads=1)
    with Rig(path, config, context_tokens=CONTEXT) as rig:
        yield rig


@pytest.fixture(scope="module")
def resident(rig: Rig) -> FloatArray:
    """Logits of every position."""
    with rig.running(rig.all_resident()) as forward:
        return all_logits(forward, PROMPT, CHUNK)


def tight(rig: Rig, share: int = 0) -> Placement:
    """So many hundredths of the way from the smallest limit to one that holds everything."""
    low, high = smallest_bytes(rig.demand()), rig.all_resident().num_bytes
    return place(rig.demand(low + (high - low) * share // 100))


def assert_same_bits(got: FloatArray, want: FloatArray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("share", [0, 40, 80])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_every_length_gives_what_resident_weights_give(
    rig: Rig, resident: FloatArray, schedule: str, share: int
) -> None:
    placement = tight(rig, share)
    assert placement.borrowers
    with rig.running(placement, schedule=schedule) as forward:
        for num_tokens in (CONTEXT, CHUNK, 10 * CHUNK):  # grows, is emptied, grows again
            assert_same_bits(all_logits(forward, PROMPT[:num_tokens], CHUNK), resident[:num_tokens])


def bytes_of_a_pass(forward: Forward, position: int) -> int:
    """Of one more token there; the pass before has read what came to stay."""
    for start in (position, position + 1):
        forward.take_stats()
        forward.run([PROMPT[start]], start, [0])
    return forward.take_stats().bytes_read


def test_a_pass_reads_what_the_placement_says(rig: Rig, resident: FloatArray) -> None:
    placement = tight(rig)
    with rig.running(placement, schedule="sequential") as forward:
        all_logits(forward, PROMPT, CHUNK)
        positions = [*range(1, CONTEXT, ROWS_PER_CLASS), CONTEXT - 2]
        read = [bytes_of_a_pass(forward, position) for position in positions]
    want = [placement.at(position).streamed_bytes for position in positions]
    assert read == want == sorted(want) and want[0] < want[-1] == placement.streamed_bytes


def test_memory_is_charged_to_whom_it_serves(rig: Rig) -> None:
    placement = tight(rig)
    assembly = Assembly(rig.blueprint, placement, CONTEXT, placement.num_bytes, RealClock(), NullTracer())
    try:
        for position in (0, 3 * ROWS_PER_CLASS, CONTEXT - 1, ROWS_PER_CLASS, 0):
            assembly.forward.run([5], position, [0])
            held, then = assembly.ledger.breakdown(), placement.at(position + 1)
            assert held[KV_CACHE] == then.fixed[KV_CACHE]
            assert held.get("resident weights", 0) == then.resident_bytes
            assert assembly.ledger.in_use_bytes <= placement.num_bytes
    finally:
        assembly.close()
    assert assembly.ledger.in_use_bytes == 0 and assembly.ledger.peak_bytes <= placement.num_bytes


def test_everything_stays_while_the_context_is_short(rig: Rig, resident: FloatArray) -> None:
    placement = next(p for p in (tight(rig, share) for share in range(100)) if not p.at(1).streamed_bytes)
    assert placement.streamed_bytes
    with rig.running(placement) as forward:
        assert_same_bits(all_logits(forward, PROMPT[:CHUNK], CHUNK), resident[:CHUNK])
        forward.take_stats()
        assert_same_bits(all_logits(forward, PROMPT[:CHUNK], CHUNK), resident[:CHUNK])
        assert forward.take_stats().num_reads == 0
        assert_same_bits(all_logits(forward, PROMPT, CHUNK), resident)


def test_all_units_come_and_some_go_within_a_length_class(rig: Rig) -> None:
    """Graphs stay what they are, and that of a whole pass is bound to where all weights were."""
    short = copy(rig)
    short.context_tokens = 4 * ROWS_PER_CLASS
    placements = (tight(short, share) for share in range(100))
    placement = next(p for p in placements if not p.at(1).streamed_bytes and p.at(ROWS_PER_CLASS).streamed_bytes)
    with short.running(short.all_resident()) as forward:
        want = all_logits(forward, PROMPT[:ROWS_PER_CLASS], 16)
    elsewhere = []  # whoever comes back finds its former address taken
    with short.running(placement) as forward:
        for length in (ROWS_PER_PAGE, ROWS_PER_CLASS, ROWS_PER_PAGE, ROWS_PER_CLASS // 2, ROWS_PER_PAGE):
            assert_same_bits(all_logits(forward, PROMPT[:length], 16), want[:length])
            elsewhere += [mmap(-1, each.place_bytes) for each in placement.borrowers]


def test_a_pass_that_was_cancelled_leaves_room_for_the_next(rig: Rig, resident: FloatArray) -> None:
    placement = tight(rig, 40)
    with rig.running(placement) as forward:
        all_logits(forward, PROMPT[:CHUNK], CHUNK)
        assert isinstance(rig.compute.backend, CpuBackend)
        abort = rig.compute.backend.abort
        abort.set()
        with pytest.raises(Cancelled):
            all_logits(forward, PROMPT, CHUNK)
        abort.clear()
        assert_same_bits(all_logits(forward, PROMPT, CHUNK), resident)
