"""planner.prefill_share: a pass with a part of a prompt is hardly slower than one without, where the drive is busy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipo.planner.cost import PassLoad
from pipo.planner.prefill_share import SLOWER, prefill_beside_decode
from pipo.planner.simulate import Forecast, Lane

CHUNKS = (16, 32, 64, 128, 256, 512)
DECODE = PassLoad(4, 1, 100.0)


@dataclass
class Machine:
    """Reads for a second in every pass and computes so long for each token."""

    compute_s: float
    read_s: float = 1.0

    def forecast(self, load: PassLoad) -> Forecast:
        busy = dict.fromkeys(Lane, 0.0) | {Lane.DRIVE: self.read_s, Lane.CPU: self.compute_s * load.num_tokens}
        return Forecast(seconds=max(busy.values()), busy=busy)


@pytest.mark.parametrize("compute_s", [0.0001, 0.001, 0.003, 0.009, 0.02])
def test_as_much_as_the_drive_leaves_time_for(compute_s: float) -> None:
    found = prefill_beside_decode(Machine(compute_s).forecast, DECODE, CHUNKS)
    assert found is not None
    assert compute_s * (found + 4) <= SLOWER or found == 16
    assert found == 512 or compute_s * (2 * found + 4) > SLOWER


def test_no_limit_where_compute_is_busiest() -> None:
    assert prefill_beside_decode(Machine(1.0).forecast, DECODE, CHUNKS) is None
