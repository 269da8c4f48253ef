"""pipeline.executor: walks lists of steps over a drive in memory, on a clock that only moves when somebody waits."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from pipo.base.clock import VirtualClock
from pipo.base.errors import Cancelled, ComputeError, FileChanged, ReadFailed
from pipo.base.manifest import TensorSpec
from pipo.base.trace import Tracer
from pipo.pipeline.executor import Executor, Places, _Arrival
from pipo.pipeline.stats import StallCause
from pipo.pipeline.units import Unit
from pipo.planner.residency import Need, Pool, Residency, SlotId, Step, StepKind, Tier, UnitId
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Simulator, StepCosts
from pipo.store.index import layout_unit
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Place, SlotPool
from pipo.transfer.handle import Handle
from pipo.transfer.null import NullDrive, NullTransfer
from tests.support.transfers import matrix, xor_rows, xored

UNIT_BYTES, BYTES_PER_S = 10_000, 1e6
READ_S, COMPUTE_S = UNIT_BYTES / BYTES_PER_S, 0.004
NUM_UNITS = 7
CONTENT = random.Random(1).randbytes(NUM_UNITS * UNIT_BYTES)
STREAMED = {UnitId(i): i % 2 for i in (0, 1, 3, 4, 5)}  # by class; the others are resident
NUM_SLOTS = (1, 2)
NEEDS = [Need(i, UnitId(i)) for i in range(NUM_UNITS)]
NEEDS.insert(6, Need(NUM_UNITS, None))  # the final norm has no unit

COMPUTE, READ, RELEASE = StepKind.COMPUTE, StepKind.READ, StepKind.RELEASE


def tensor_of(unit: UnitId) -> TensorSpec:
    return matrix(f"t{unit}", unit * UNIT_BYTES, UNIT_BYTES // 8, 8)


def make_units(*, are_repacked: bool) -> list[Unit]:
    tensors = [tensor_of(UnitId(i)) for i in range(NUM_UNITS)]
    layouts = [layout_unit([t], repacked=[t.name] if are_repacked else []) for t in tensors]
    return [Unit(UnitId(i), i, f"unit {i}", layout, {f"t{i}": UNIT_BYTES}) for i, layout in enumerate(layouts)]


@dataclass
class Line:
    """An executor, and what its stages found in the places they were given."""

    drive: NullDrive = field(default_factory=lambda: NullDrive(BYTES_PER_S))
    are_repacked: bool = False
    abort_after_s: float | None = None
    computed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock, self.tracer = VirtualClock(), Tracer()
        self.transfer = NullTransfer([CONTENT], self.drive, clock=self.clock, repack=xor_rows)
        self.units = make_units(are_repacked=self.are_repacked)
        sizes = [unit.layout.num_bytes for unit in self.units]
        pool = SlotPool([max(sizes) + 4096] * (NUM_UNITS + sum(NUM_SLOTS)), name="slots", ledger=Ledger(1 << 30))
        homes = {UnitId(i): place for i, place in enumerate(pool.places[:NUM_UNITS])}
        slots = {SlotId(i): place for i, place in enumerate(pool.places[NUM_UNITS:])}
        free = [deque([SlotId(0)]), deque([SlotId(1), SlotId(2)])]
        residency = Residency(Pool(dict(STREAMED), free, {u.unit_id for u in self.units} - STREAMED.keys()))
        self.executor = Executor(
            self.units, Places(homes, slots), residency, self.transfer, self.clock, self.tracer, self.is_aborted
        )

    def is_aborted(self) -> bool:
        return self.abort_after_s is not None and self.clock.now() >= self.abort_after_s

    def run(self, schedule: str = "pipelined") -> list[Step]:
        """One pass."""
        steps = SCHEDULES[schedule](NEEDS, [u.unit_id for u in self.units], self.executor.residency.copy())
        self.executor.run(steps, self.compute)
        return steps

    def compute(self, step: Step, place: Place | None) -> None:
        stage_idx = step.stage_idx
        if stage_idx < NUM_UNITS:
            assert place is not None
            unit = self.units[stage_idx]
            start = unit.layout.offsets[f"t{stage_idx}"]
            want = CONTENT[stage_idx * UNIT_BYTES : (stage_idx + 1) * UNIT_BYTES]
            assert bytes(place.view[start : start + UNIT_BYTES]) == (xored(want) if self.are_repacked else want)
        else:
            assert place is None
        self.computed.append(stage_idx)
        self.clock.sleep(COMPUTE_S)


@pytest.mark.parametrize("are_repacked", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_stages_find_their_bytes_in_whatever_order_they_arrive(schedule: str, seed: int, are_repacked: bool) -> None:
    line = Line(NullDrive(BYTES_PER_S, max_jitter_s=5 * READ_S, seed=seed), are_repacked)
    for _ in range(3):
        line.run(schedule)
    assert line.computed == [need.stage_idx for need in NEEDS] * 3, f"{seed=}"
    first, later = NUM_UNITS - len(STREAMED), 3 * len(STREAMED)
    assert line.executor.stats.num_reads == first + later + len(line.executor.residency.ram.held)
    assert line.executor.stats.bytes_read == line.executor.stats.num_reads * UNIT_BYTES


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_is_that_of_the_simulator(schedule: str) -> None:
    line = Line()
    read_s = {unit.unit_id: READ_S for unit in line.units}
    costs = StepCosts(read_s, dict.fromkeys(range(NUM_UNITS + 1), COMPUTE_S))
    simulated = Simulator({unit.stage_idx: unit.unit_id for unit in line.units})
    for _ in range(3):
        simulated.run(line.run(schedule), costs)
    last = max(zone.end_s for zone in line.tracer.zones if not zone.name.startswith("wait"))
    assert last == pytest.approx(simulated.computed, abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_seconds_add_up(schedule: str, seed: int) -> None:
    """Compute and stalls by cause are the whole time of every pass."""
    line = Line(NullDrive(BYTES_PER_S, max_jitter_s=READ_S, seed=seed))
    for _ in range(3):
        line.run(schedule)
        stats = line.executor.stats
        assert stats.wall_s == pytest.approx(stats.compute_s + stats.total_stall_s, abs=1e-9), f"{seed=}"
    assert stats.compute_s == pytest.approx(3 * len(NEEDS) * COMPUTE_S)
    assert stats.num_passes == 3 and stats.num_bubbles > 0
    waits = [zone for zone in line.tracer.zones if zone.name.startswith("wait for")]
    assert sum(zone.end_s - zone.start_s for zone in waits) == pytest.approx(stats.total_stall_s)
    assert all(a.end_s <= b.start_s for a, b in pairwise(line.tracer.zones)), "one thing at a time"


class ScriptedHandle(Handle):
    """Ends when it is waited for, with the times it was given."""

    def __init__(self, clock: VirtualClock, started_s: float, read_s: float, finished_s: float) -> None:
        super().__init__("unit", num_bytes=1, num_chunks=1, submitted_s=0.0)
        self._clock, self._ends_s = clock, finished_s
        self.begin_chunk(started_s)
        self.end_read(1, read_s)

    def wait(self, timeout_s: float | None = None) -> None:
        left_s = self._ends_s - self._clock.now()
        self._clock.sleep(left_s if timeout_s is None else min(left_s, timeout_s))
        if self._clock.now() >= self._ends_s - 1e-9 and not self.is_done:
            self.end_chunk(self._ends_s)


@pytest.mark.parametrize(
    ("times", "now", "want"),
    [
        ((2.0, 5.0, 6.0), 1.0, (1.0, 3.0, 1.0)),
        ((2.0, 5.0, 6.0), 3.0, (0.0, 2.0, 1.0)),
        ((2.0, 5.0, 6.0), 5.5, (0.0, 0.0, 0.5)),
        ((0.0, 0.0, 1.0), 0.0, (0.0, 0.0, 1.0)),
    ],
)
def test_causes_of_a_stall(times: tuple[float, float, float], now: float, want: tuple[float, float, float]) -> None:
    """Queued until it started, reading until its last byte came, then repacking."""
    line = Line()
    line.clock.sleep(now)
    handle = ScriptedHandle(line.clock, *times)
    line.executor._arrivals[Tier.RAM, UnitId(2)] = _Arrival(line.units[2], handle, line.executor._ram.homes[UnitId(2)])
    line.executor.run([Step(COMPUTE, 2)], lambda step, place: None)
    stalls = line.executor.stats.stall_s
    found = [stalls[cause] for cause in (StallCause.QUEUE, StallCause.DISK, StallCause.REPACK)]
    assert found == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("nth", range(1, 14))
def test_nth_read_fails(schedule: str, nth: int) -> None:
    """No stage computes without its unit; the error comes again in every later pass."""
    line = Line(NullDrive(BYTES_PER_S, fail_nth=nth))
    with pytest.raises(ReadFailed) as failed:
        for _ in range(3):
            line.run(schedule)
    computed = list(line.computed)
    assert computed == ([need.stage_idx for need in NEEDS] * 3)[: len(computed)]
    for _ in range(2):
        with pytest.raises(ReadFailed) as again:
            line.run(schedule)
        assert again.value is failed.value
    assert len(line.computed) - len(computed) <= 2 * len(NEEDS), "only stages whose units had arrived"


def test_nth_read_fails_of_a_model_that_stays_in_ram() -> None:
    """Asked whether everything is there, it never says yes."""
    line = Line(NullDrive(BYTES_PER_S, fail_nth=5))
    line.executor.residency.ram.classes = {}
    line.executor.residency.ram.missing = {unit.unit_id for unit in line.units}
    with pytest.raises(ReadFailed):
        line.run()
    for _ in range(3):
        with pytest.raises(ReadFailed):
            assert not line.executor.is_settled


def test_settled_when_everything_has_arrived() -> None:
    line = Line()
    line.executor.residency.ram.classes = {}
    line.executor.residency.ram.missing = {unit.unit_id for unit in line.units}
    assert not line.executor.is_settled
    line.run()
    assert line.executor.is_settled
    assert line.executor.place_of(UnitId(3)) is line.executor._ram.homes[UnitId(3)]


def test_not_settled_while_reads_of_an_interrupted_pass_are_under_way() -> None:
    line = Line(abort_after_s=2.5 * READ_S)
    line.executor.residency.ram.classes = {}
    line.executor.residency.ram.missing = {unit.unit_id for unit in line.units}
    with pytest.raises(Cancelled):
        line.run()
    assert line.executor.residency.is_settled and not line.executor.is_settled
    line.clock.sleep(NUM_UNITS * READ_S)
    assert line.executor.is_settled


def test_never_settled_while_units_stream() -> None:
    line = Line()
    line.run()
    assert not line.executor.is_settled


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_cancelled_at_any_moment_then_asked_again(schedule: str, seed: int) -> None:
    """Whatever is in flight or half read ahead: the next pass finds every unit, from a drive that is still busy."""
    rng = random.Random(seed)
    line = Line(NullDrive(BYTES_PER_S, max_jitter_s=READ_S, seed=seed))
    for _ in range(6):
        line.abort_after_s = line.clock.now() + rng.uniform(0, 9 * READ_S)
        try:
            line.run(schedule)
        except Cancelled:
            line.computed.clear()
            line.abort_after_s = None
            line.run(schedule)
        assert line.computed[-len(NEEDS) :] == [need.stage_idx for need in NEEDS], f"{seed=}"


def test_slot_stays_held_when_its_release_is_cancelled() -> None:
    line = Line(abort_after_s=READ_S / 2)
    read, release = Step(READ, unit_id=UnitId(0), slot_id=SlotId(0)), Step(RELEASE, unit_id=UnitId(0))
    with pytest.raises(Cancelled):
        line.executor.run([read, release], line.compute)
    assert line.executor.residency.ram.held == {UnitId(0): SlotId(0)}
    line.abort_after_s = None
    line.executor.run([Step(COMPUTE, 0), release], line.compute)
    assert line.computed == [0] and not line.executor.residency.ram.held


def test_failing_stage_ends_the_pass_and_leaves_the_units() -> None:
    line = Line()

    def compute(step: Step, place: Place | None) -> None:
        if step.stage_idx == 3:
            raise ComputeError("no")

    steps = SCHEDULES["pipelined"](NEEDS, [u.unit_id for u in line.units], line.executor.residency.copy())
    with pytest.raises(ComputeError):
        line.executor.run(steps, compute)
    assert UnitId(3) in line.executor.residency.ram.held
    line.run()
    assert line.computed == [need.stage_idx for need in NEEDS]


def test_files_are_checked_before_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    line.run()

    def changed() -> None:
        raise FileChanged("changed", path="model", offset=0, wanted_bytes=2, got_bytes=1)

    monkeypatch.setattr(line.transfer, "check_files", changed)
    with pytest.raises(FileChanged):
        line.run()
    assert len(line.computed) == len(NEEDS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_units_move_in_and_out_between_passes(schedule: str, seed: int) -> None:
    """Wherever its reads are when a unit moves, the stage finds its bytes; while it stays it is read once."""
    line = Line(NullDrive(BYTES_PER_S, max_jitter_s=5 * READ_S, seed=seed))
    rest = SlotPool([UNIT_BYTES + 8192] * 2, name="homes", ledger=Ledger(1 << 30))
    for unit, place in zip((UnitId(0), UnitId(4)), rest.places, strict=True):
        line.run(schedule)
        line.executor.move_in(unit, place)
    line.run(schedule)
    before = line.executor.stats.num_reads
    line.run(schedule)
    num_passing = len(STREAMED) - 2
    assert line.executor.stats.num_reads - before <= num_passing
    assert line.executor.place_of(UnitId(4)) is rest.places[1]
    for unit in (UnitId(4), UnitId(0)):
        line.executor.move_out(unit, STREAMED[unit])
        line.run(schedule)
    rest.close()
    line.run(schedule)
    assert line.computed == [need.stage_idx for need in NEEDS] * 7, f"{seed=}"


def test_a_unit_stays_where_it_is_when_moving_out_is_cancelled() -> None:
    line = Line(NullDrive(BYTES_PER_S, max_jitter_s=5 * READ_S, seed=1))
    place = SlotPool([UNIT_BYTES + 8192], name="homes", ledger=Ledger(1 << 30)).places[0]
    line.run()
    line.executor.move_in(UnitId(5), place)
    line.executor.run([line.executor.residency.copy().read(UnitId(5))], line.compute)
    line.abort_after_s = 0.0
    with pytest.raises(Cancelled):
        line.executor.move_out(UnitId(5), STREAMED[UnitId(5)])
    line.abort_after_s = None
    line.run()
    assert line.executor.place_of(UnitId(5)) is place
