"""Schedules on a virtual clock: the executor's rules over the seconds that each step costs.

Every link and every computer is a lane that does one thing at a time, in the order it was asked. A step begins when
its lane is free, the steps it depends on have ended and the executor has come to it, as `pipo.planner.schedule` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from pipo.planner.residency import Need, Residency, SlotId, Step, StepKind, Tier, UnitId, in_micro_batches
from pipo.planner.schedule import Schedule

NUM_KV_SLOTS = 2  # on the device, for keys and values that live in RAM: one loads while the other is used


class Lane(Enum):
    DRIVE = "drive"
    UPLOAD = "upload"  # RAM → device
    DOWNLOAD = "download"  # device → RAM
    CPU = "cpu"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """Seconds of a stage of experts: reading those that are missing, of which some were guessed one block ahead, and
    computing those that are here and those that are not.
    """

    read_guessed: float
    read_late: float
    compute_here: float
    compute_missing: float

    @property
    def read_s(self) -> float:
        return self.read_guessed + self.read_late

    @property
    def compute_s(self) -> float:
        return self.compute_here + self.compute_missing

    def slowed(self, read: float, compute: float) -> ExpertCosts:
        return ExpertCosts(
            self.read_guessed * read, self.read_late * read, self.compute_here * compute, self.compute_missing * compute
        )


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of every step that may come up; what is absent costs nothing.

    `handover` is paid where a stage computes elsewhere than the one before it, `routing_handover` where that is a stage
    of experts, `between_passes` at the end of each pass. Stages whose keys and values move compute, load and save in
    `num_micro_batches`, and what they cost is each one's, all being taken as equal.
    """

    read: Mapping[UnitId, float]
    compute: Mapping[int, float]
    copy: Mapping[UnitId, float] = field(default_factory=dict)
    kv_load: Mapping[int, float] = field(default_factory=dict)
    kv_save: Mapping[int, float] = field(default_factory=dict)
    on_device: frozenset[int] = frozenset()  # stages that compute there
    handover: float = 0.0
    routing_handover: float = 0.0
    between_passes: float = 0.0
    experts: Mapping[int, ExpertCosts] = field(default_factory=dict)  # of stages that route, on the CPU
    num_micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class Span:
    """What a lane did, from `begin` to `end` seconds. `step` names it."""

    lane: Lane
    step: Step
    begin: float
    end: float


class Simulator:
    """Runs passes one after another. `now` is when the executor would come to the next step, in seconds from the
    first one. Threads: one.
    """

    def __init__(self, unit_of_stage: Mapping[int, UnitId]) -> None:
        self.now = 0.0
        self.computed = 0.0  # when the newest stage has ended: the next one needs its result
        self.spans: list[Span] = []
        self._costs = StepCosts({}, {})
        self._unit_of_stage = unit_of_stage
        self._free: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
        self._arrived: dict[tuple[Tier, UnitId], float] = {}
        self._used: dict[tuple[Tier, UnitId], float] = {}  # until when the unit's place there is in use
        self._slot_free: dict[tuple[Tier, SlotId], float] = {}
        self._kv_ready: dict[tuple[int, int], float] = {}  # by stage and micro-batch
        self._kv_saved: dict[tuple[int, int], float] = {}
        self._kv_slots = [0.0] * NUM_KV_SLOTS  # when each is free
        self._kv_slot_of: dict[tuple[int, int], int] = {}
        self._num_kv_loads = 0
        self._last_lane: Lane | None = None
        self._guessed = 0.0  # when the experts that were guessed for the next block have arrived

    def run(self, steps: Sequence[Step], costs: StepCosts) -> None:
        """One pass; it ends when its last stage has been computed."""
        self._costs = costs
        for step in steps:
            self._do[step.kind](self, step)
        self.now = max(self.now, self.computed) + self._costs.between_passes

    def _read(self, step: Step) -> None:
        begin = max(self.now, self._slot_free.get((Tier.RAM, step.slot_id), 0.0))
        self._arrive(Tier.RAM, step.unit_id, self._take(Lane.DRIVE, step, begin, self._costs.read.get(step.unit_id)))

    def _copy(self, step: Step) -> None:
        source = self._arrived.get((Tier.RAM, step.unit_id), 0.0)
        begin = max(self.now, source, self._slot_free.get((Tier.DEVICE, step.slot_id), 0.0))
        end = self._take(Lane.UPLOAD, step, begin, self._costs.copy.get(step.unit_id))
        self._arrive(Tier.DEVICE, step.unit_id, end)
        self._used[Tier.RAM, step.unit_id] = end

    def _arrive(self, tier: Tier, unit: UnitId, end: float) -> None:
        self._arrived[tier, unit] = self._used[tier, unit] = end

    def _compute(self, step: Step) -> None:
        lane = Lane.DEVICE if step.stage_idx in self._costs.on_device else Lane.CPU
        place = Tier.DEVICE if lane is Lane.DEVICE else Tier.RAM, self._unit_of_stage.get(step.stage_idx, UnitId(-1))
        self.now = max(self.now, self._arrived.get(place, 0.0), self._kv_ready.get(step.turn, 0.0))
        begin = max(self.now, self.computed)
        if self._last_lane is not None and lane is not self._last_lane:
            begin += self._costs.handover
        end = self._take(lane, step, begin, self._costs.compute.get(step.stage_idx))
        self._used[place] = self.computed = end
        self._last_lane = lane
        if lane is Lane.CPU:
            self.now = end  # computed on the executor's own thread; a device is only told to

    def _route(self, step: Step) -> None:
        """Those that are here compute while the others arrive; then the drive goes on with the next block's guesses."""
        costs = self._costs.experts.get(step.stage_idx)
        if costs is None:
            return
        begin = max(self.now, self.computed)
        if self._last_lane is Lane.DEVICE:
            begin += self._costs.routing_handover
        arrived = max(self._take(Lane.DRIVE, step, begin, costs.read_late), self._guessed)
        here = self._take(Lane.CPU, step, begin, costs.compute_here)
        self.now = self.computed = self._take(Lane.CPU, step, max(here, arrived), costs.compute_missing)
        self._guessed = self._take(Lane.DRIVE, step, begin, costs.read_guessed)
        self._last_lane = Lane.CPU

    def _release(self, step: Step) -> None:
        self._slot_free[step.tier, step.slot_id] = self._used.pop((step.tier, step.unit_id), self.now)

    def _kv_load(self, step: Step) -> None:
        slot = self._kv_slot_of[step.turn] = self._num_kv_loads % NUM_KV_SLOTS
        self._num_kv_loads += 1
        begin = max(self.now, self._kv_slots[slot], self._kv_saved.get(step.turn, 0.0))
        end = self._take(Lane.UPLOAD, step, begin, self._costs.kv_load.get(step.stage_idx))
        self._kv_ready[step.turn] = self._kv_slots[slot] = end

    def _kv_save(self, step: Step) -> None:
        end = self._take(Lane.DOWNLOAD, step, self.computed, self._costs.kv_save.get(step.stage_idx))
        self._kv_saved[step.turn] = end
        self._kv_slots[self._kv_slot_of[step.turn]] = end

    def _barrier(self, step: Step) -> None:
        self.now = max(self.now, *self._free.values())

    def _take(self, lane: Lane, step: Step, begin: float, seconds: float | None) -> float:
        begin = max(begin, self._free[lane])
        self._free[lane] = end = begin + (seconds or 0.0)
        if seconds:
            self.spans.append(Span(lane, step, begin, end))
        return end

    _do: ClassVar = {
        StepKind.READ: _read,
        StepKind.COPY: _copy,
        StepKind.COMPUTE: _compute,
        StepKind.ROUTE: _route,
        StepKind.RELEASE: _release,
        StepKind.KV_LOAD: _kv_load,
        StepKind.KV_SAVE: _kv_save,
        StepKind.BARRIER: _barrier,
    }


@dataclass(frozen=True, slots=True)
class Forecast:
    """One pass among many equal ones: its seconds, and how long each lane was busy within it."""

    seconds: float
    busy: Mapping[Lane, float]

    def share(self, lane: Lane) -> float:
        """Of the pass, 0 to 1."""
        return self.busy[lane] / self.seconds if self.seconds else 0.0

    @property
    def stall_share(self) -> float:
        """What of the pass the busiest lane waits: nothing, in a pipeline without an avoidable stall."""
        return 1 - max(map(self.share, self.busy), default=1.0)


class Line:
    """A model on a machine of which only the seconds matter: passes over the same stages, one after another.

    `residency` is what is where before the first of them, and follows them. Threads: one.
    """

    def __init__(self, needs: Sequence[Need], schedule: Schedule, residency: Residency) -> None:
        self._needs = needs
        self._units = [need.unit_id for need in needs if need.unit_id is not None]
        self._schedule = schedule
        self._residency = residency
        self.simulator = Simulator({n.stage_idx: n.unit_id for n in needs if n.unit_id is not None})

    def run_pass(self, costs: StepCosts) -> float:
        """Returns its seconds."""
        begin = self.simulator.now
        needs = in_micro_batches(self._needs, costs.num_micro_batches)
        steps = self._schedule(needs, self._units, self._residency.copy())
        for step in steps:
            self._residency.apply(step)
        self.simulator.run(steps, costs)
        return self.simulator.now - begin

    def forecast(self, costs: StepCosts, *, num_warm: int = 2, num_passes: int = 2) -> Forecast:
        """The mean of `num_passes` passes after `num_warm`, by when what stays has arrived and slots are full."""
        for _ in range(num_warm):
            self.run_pass(costs)
        begin = self.simulator.now
        seconds = sum(self.run_pass(costs) for _ in range(num_passes))
        busy = dict.fromkeys(Lane, 0.0)
        for span in self.simulator.spans:
            busy[span.lane] += max(min(span.end, self.simulator.now) - max(span.begin, begin), 0.0) / num_passes
        return Forecast(seconds / num_passes, busy)
