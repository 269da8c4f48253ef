"""What the order of steps alone gives: blocks of attention and an MLP twice its size, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipo.planner.residency import Need, Pool, Residency, UnitId, numbered_slots
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Forecast, Lane, Line, StepCosts

NUM_BLOCKS = 40
SIZES = (1.0, 2.0)  # of attention and of an MLP: bytes and arithmetic alike
NUM_STAGES = NUM_BLOCKS * len(SIZES)
SLOTS_PER_CLASS = 2
BALANCES = (0.25, 0.5, 2 / 3, 1.0, 1.5, 2.0, 4.0)
RESIDENT_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True)
class Point:
    """`balance`: seconds a pass computes for each that it loads. `resident_share`: of the blocks, evenly spread."""

    resident_share: float
    balance: float
    sequential: Forecast
    layer: Forecast
    pipelined: Forecast

    @property
    def over_layer(self) -> float:
        return self.layer.seconds / self.pipelined.seconds

    @property
    def over_sequential(self) -> float:
        return self.sequential.seconds / self.pipelined.seconds


def sweep() -> list[Point]:
    return [point(share, balance) for share in RESIDENT_SHARES for balance in BALANCES]


def point(resident_share: float, balance: float) -> Point:
    each = (_run(name, resident_share, balance) for name in ("sequential", "layer", "pipelined"))
    return Point(resident_share, balance, *each)


def through_ram() -> Point:
    """At balance with everything streamed, over two links in a row that take the same time: drive → RAM → device."""
    each = (_run(name, 0.0, 1.0, on_device=True) for name in ("sequential", "layer", "pipelined"))
    return Point(0.0, 1.0, *each)


def _run(schedule: str, resident_share: float, balance: float, on_device: bool = False) -> Forecast:
    needs = [Need(i, UnitId(i)) for i in range(NUM_STAGES)]
    costs = _costs(resident_share, balance)
    if on_device:
        costs = replace(costs, copy=costs.read, on_device=frozenset(range(NUM_STAGES)))
    return Line(needs, SCHEDULES[schedule], _residency(resident_share, on_device)).forecast(costs)


def _costs(resident_share: float, balance: float) -> StepCosts:
    """Loading takes 1 s for a size of 1; computing as much longer as the balance over all blocks wants."""
    compute = balance * (1 - resident_share)
    sizes = [SIZES[i % len(SIZES)] for i in range(NUM_STAGES)]
    return StepCosts(
        read={UnitId(i): size for i, size in enumerate(sizes)},
        compute={i: size * compute for i, size in enumerate(sizes)},
    )


def _residency(resident_share: float, on_device: bool) -> Residency:
    units = [UnitId(i) for i in range(NUM_STAGES) if not _is_resident(i // len(SIZES), resident_share)]
    return Residency(_pool(units), _pool(units), frozenset(units)) if on_device else Residency(_pool(units))


def _pool(units: Sequence[UnitId]) -> Pool:
    return Pool({unit: unit % len(SIZES) for unit in units}, numbered_slots([SLOTS_PER_CLASS] * len(SIZES)), set())


def _is_resident(block: int, share: float) -> bool:
    return int((block + 1) * share + 1e-9) > int(block * share + 1e-9)


def busy(each: Forecast) -> float:
    """Of the one computer there is."""
    return each.share(Lane.CPU) + each.share(Lane.DEVICE)
