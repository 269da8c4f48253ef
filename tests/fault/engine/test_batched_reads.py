"""Many requests at once when reads fail: those that share the pass end with the error, later ones too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.errors import ReadFailed
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, Summary
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.engines import smallest_ram_bytes
from tests.support.small_engine import GREEDY, PROMPT, SETTINGS, start

SEVERAL = {**SETTINGS, "num_sequences": 2}
REQUESTS = [GenerationRequest([*PROMPT[: 3 + i], 5], GREEDY) for i in range(5)]


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("nth", [60, 100, 160, 250])
def test_nth_read_fails(original: Path, nth: int, for_ever: bool) -> None:
    smallest = smallest_ram_bytes(original, **SEVERAL)
    with start(original, smallest, num_sequences=2) as engine:
        want = [answer.token_ids for answer in engine.complete_batch([each.prompt for each in REQUESTS], GREEDY)]
    with start(original, smallest, faulty_preadv(Fault.FAIL, nth, for_ever=for_ever), num_sequences=2) as engine:
        ends: dict[int, object] = {}
        tokens: dict[int, list[int]] = {i: [] for i in range(5)}
        for number, what in engine.stream_requests(REQUESTS):
            if isinstance(what, Piece):
                tokens[number] += [what.token.token_id] if what.token else []
            else:
                ends[number] = what
    first_failed = min(number for number in range(5) if isinstance(ends[number], ReadFailed))
    assert all(isinstance(ends[number], ReadFailed) for number in range(first_failed + 2, 5)), "all later ones, too"
    for number in range(5):
        if isinstance(ends[number], Summary):
            assert tuple(tokens[number]) == want[number]
