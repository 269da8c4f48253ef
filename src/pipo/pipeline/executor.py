"""THE loop: walks a list of steps, starts transfers, waits for what a stage needs, computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pipo.base.clock import Clock
from pipo.base.errors import Cancelled
from pipo.base.trace import Tracer
from pipo.pipeline.stats import PassStats, StallCause
from pipo.pipeline.units import Unit
from pipo.planner.residency import Residency, SlotId, Step, StepKind, UnitId
from pipo.store.index import Read
from pipo.tiers.ram import Place
from pipo.transfer.handle import Handle

_WAKE_S = 0.1  # how often a wait looks at the abort flag


class Transfer(Protocol):
    def submit(self, reads: Sequence[Read], place: Place, label: str) -> Handle: ...

    def check_files(self) -> None: ...


class Executor:
    """Runs steps on the calling thread. After an error the residency still says what is where, so a later pass can
    be scheduled from it. Threads: one.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        homes: Mapping[UnitId, Place],
        slots: Mapping[SlotId, Place],
        residency: Residency,
        transfer: Transfer,
        clock: Clock,
        tracer: Tracer,
        is_aborted: Callable[[], bool],
    ) -> None:
        self.residency = residency
        self.stats = PassStats()
        self._units = units
        self._homes = homes
        self._slots = slots
        self._transfer = transfer
        self._clock = clock
        self._tracer = tracer
        self._is_aborted = is_aborted
        self._unit_of_stage = {unit.stage_idx: unit for unit in units}
        self._arrivals: dict[UnitId, tuple[Handle, Place]] = {}
        self._is_settled = False

    def run(self, steps: Sequence[Step], compute: Callable[[int, Place | None], None]) -> None:
        """Do every step in order; `compute(stage_idx, place of its unit)` does one stage.

        Raises TransferError, ComputeError, Cancelled: the first failure ends the pass.
        """
        self._transfer.check_files()
        begin = self._clock.now()
        for step in steps:
            if step.kind is StepKind.COMPUTE:
                self._compute(step.stage_idx, compute)
            elif step.kind is StepKind.READ:
                self._read(step)
            elif step.kind is StepKind.RELEASE:
                self._release(step.unit_id)
            else:
                self._wait_for_all()
        self.stats.num_passes += 1
        self.stats.wall_s += self._clock.now() - begin

    @property
    def is_settled(self) -> bool:
        """Nothing streams and every unit has arrived. An interrupted pass may have left reads in flight."""
        if not self._is_settled and self.residency.is_settled:
            have_ended = all(handle.is_done for handle, _ in self._arrivals.values())
            for handle, _ in self._arrivals.values():
                handle.wait(0)  # raises what the transfer met, however often one asks
            self._is_settled = have_ended
        return self._is_settled

    def wait_for(self, handle: Handle) -> None:
        """Wait for a read that belongs to no step; a stall like any other. Raises TransferError, Cancelled."""
        if not handle.is_done:
            self.stats.wall_s += self._stall(handle, handle.label)
        handle.wait(0)

    def place_of(self, unit_id: UnitId) -> Place:
        """Where a unit that was read is now."""
        return self._arrivals[unit_id][1]

    def _read(self, step: Step) -> None:
        self.residency.apply(step)
        unit = self._units[step.unit_id]
        place = self._homes[unit.unit_id] if step.slot_id < 0 else self._slots[step.slot_id]
        self._arrivals[unit.unit_id] = self._transfer.submit(unit.layout.reads, place, unit.label), place
        self.stats.num_reads += 1
        self.stats.bytes_read += unit.num_bytes

    def _compute(self, stage_idx: int, compute: Callable[[int, Place | None], None]) -> None:
        unit = self._unit_of_stage.get(stage_idx)
        place = None
        if unit is not None:
            handle, place = self._arrivals[unit.unit_id]
            if not handle.is_done:
                self._stall(handle, unit.label)
            handle.wait(0)  # raises what the transfer met
        begin = self._clock.now()
        compute(stage_idx, place)
        end = self._clock.now()
        self.stats.compute_s += end - begin
        self._tracer.zone("compute", unit.label if unit else "pass", begin, end)

    def _release(self, unit_id: UnitId) -> None:
        handle, _ = self._arrivals[unit_id]
        self._wait(handle)  # a slot is free only once nothing writes to it; cancelled meanwhile, it stays held
        del self._arrivals[unit_id]
        self.residency.apply(Step(StepKind.RELEASE, unit_id=unit_id))

    def _wait_for_all(self) -> None:
        for unit_id, (handle, _) in list(self._arrivals.items()):
            if not handle.is_done:
                self._stall(handle, self._units[unit_id].label)

    def _stall(self, handle: Handle, label: str) -> float:
        """Wait, and note why. Returns seconds."""
        begin = self._clock.now()
        self._wait(handle)
        end = self._clock.now()
        self.stats.num_bubbles += 1
        for cause, seconds in _causes(handle, begin, end).items():
            self.stats.stall_s[cause] += seconds
        self._tracer.zone("compute", f"wait for {label}", begin, end)
        return end - begin

    def _wait(self, handle: Handle) -> None:
        while not handle.is_done:
            handle.wait(_WAKE_S)
            if self._is_aborted():
                raise Cancelled("stopped while waiting for weights")


def _causes(handle: Handle, begin: float, end: float) -> dict[StallCause, float]:
    """Split the wait [begin, end] by what the transfer was doing."""
    started = min(max(end if handle.started_s is None else handle.started_s, begin), end)
    was_read = min(max(end if handle.read_s is None else handle.read_s, started), end)
    return {StallCause.QUEUE: started - begin, StallCause.DISK: was_read - started, StallCause.REPACK: end - was_read}
