"""THE loop: walks a list of steps, starts transfers, waits for what a stage needs, computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

from pipo.base.clock import Clock
from pipo.base.trace import Tracer
from pipo.compute.device import DevicePlace
from pipo.pipeline.stats import PassStats, StallCause
from pipo.pipeline.units import Unit
from pipo.planner.residency import Residency, SlotId, Step, StepKind, Tier, UnitId
from pipo.store.index import Read
from pipo.tiers.ram import Place
from pipo.transfer.handle import Handle

P = TypeVar("P", Place, DevicePlace)


@dataclass(frozen=True, slots=True)
class Places(Generic[P]):
    """Of one tier: where units stay for good, and the slots that others pass through."""

    homes: Mapping[UnitId, P] = field(default_factory=dict)
    slots: Mapping[SlotId, P] = field(default_factory=dict)

    def of(self, step: Step) -> P:
        """That a READ or COPY fills."""
        return self.homes[step.unit_id] if step.slot_id < 0 else self.slots[step.slot_id]


class Transfer(Protocol):
    """Disk → RAM."""

    def submit(
        self, reads: Sequence[Read], place: Place, label: str, after: Handle | None = None, *, is_guess: bool = False
    ) -> Handle: ...

    def hurry(self, handle: Handle) -> None:
        """What was a guess is wanted for certain."""

    def drop(self, handle: Handle) -> bool:
        """What was a guess is not wanted. False where it has begun."""

    def check_files(self) -> None: ...


class DeviceTier(Protocol):
    """RAM ↔ device. `after` are the transfers that must have ended before one begins."""

    @property
    def places(self) -> Places[DevicePlace]: ...

    def load(self, unit: Unit, source: Place, target: DevicePlace, after: Sequence[Handle]) -> Handle: ...

    def load_kv(self, stage_idx: int, micro_batch: int) -> Handle: ...

    def save_kv(self, stage_idx: int, micro_batch: int) -> Handle: ...


class NoDevice:
    """For models that compute on the CPU alone."""

    places: Places[DevicePlace] = Places()

    def load(self, unit: Unit, source: Place, target: DevicePlace, after: Sequence[Handle]) -> Handle:
        raise AssertionError("there is no device")

    def load_kv(self, stage_idx: int, micro_batch: int) -> Handle:
        raise AssertionError("there is no device")

    save_kv = load_kv


class Experts(Protocol):
    """Stages whose units are known late."""

    def unit(self, unit_id: UnitId) -> Unit: ...

    def steps(self, stage_idx: int, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        """Once the router's scores are there: those that bring the experts and compute them. Each is done before the
        next one is asked for.
        """

    def compute(self, step: Step, experts: Sequence[tuple[Unit, Place]]) -> None:
        """With the units of the step, where they are."""


class NoExperts:
    """For dense models."""

    def unit(self, unit_id: UnitId) -> Unit:
        raise AssertionError("there are no experts")

    def steps(self, stage_idx: int, is_here: Callable[[UnitId], bool]) -> Iterator[Step]:
        raise AssertionError("there are no experts")

    def compute(self, step: Step, experts: Sequence[tuple[Unit, Place]]) -> None:
        raise AssertionError("there are no experts")


Compute = Callable[[Step, Place | DevicePlace | None], None]


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A unit on its way to a place. A copy to a device may still wait for `source`, the read it copies from."""

    unit: Unit
    handle: Handle
    place: Place | DevicePlace
    source: Handle | None = None


class Executor:
    """Runs steps on the calling thread. After an error the residency still says what is where, so a later pass can
    be scheduled from it. Threads: one.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        ram: Places[Place],
        residency: Residency,
        transfer: Transfer,
        clock: Clock,
        tracer: Tracer,
        is_aborted: Callable[[], bool],
        device: DeviceTier | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.residency = residency
        self.stats = PassStats()
        self._units = units
        self._homes = dict(ram.homes)
        self._ram = Places(self._homes, ram.slots)
        self._transfer = transfer
        self._clock = clock
        self._tracer = tracer
        self._is_aborted = is_aborted
        self._device: DeviceTier = device or NoDevice()
        self._experts: Experts = experts or NoExperts()
        self._unit_of_stage = {unit.stage_idx: unit for unit in units}
        self._arrivals: dict[tuple[Tier, UnitId], _Arrival] = {}
        self._copying: dict[SlotId, Handle] = {}  # from slots in RAM that are released already
        self._kv_loads: dict[tuple[int, int], Handle] = {}  # by stage and micro-batch
        self._newest_kv_save: Handle | None = None  # they end in order
        self._is_settled = False

    def run(self, steps: Sequence[Step], compute: Compute) -> None:
        """Do every step in order; `compute(step, place of the stage's unit)` does one stage, or a micro-batch of it.

        Raises TransferError, ComputeError, Cancelled: the first failure ends the pass.
        """
        self._transfer.check_files()
        begin = self._clock.now()
        for step in steps:
            if step.kind is StepKind.COMPUTE:
                self._compute(step, compute)
            else:
                self._do(step)
        self.stats.num_passes += 1
        self.stats.wall_s += self._clock.now() - begin

    @property
    def is_settled(self) -> bool:
        """Nothing streams, experts aside, and all has arrived. An interrupted pass may have left reads in flight."""
        if not self._is_settled and self.residency.is_settled:
            arrivals = [a for (_, unit_id), a in self._arrivals.items() if unit_id < len(self._units)]
            have_ended = all(arrival.handle.is_done for arrival in arrivals)
            for arrival in arrivals:
                arrival.handle.wait(0)  # raises what the transfer met, however often one asks
            self._is_settled = have_ended
        return self._is_settled

    def wait_for(self, handle: Handle) -> None:
        """Wait for a read that belongs to no step; a stall like any other. Raises TransferError, Cancelled."""
        if not handle.is_done:
            self.stats.wall_s += self._stall(handle, handle.label)
        handle.wait(0)

    def move_in(self, unit_id: UnitId, home: Place) -> None:
        """A unit that was streamed stays in `home` from its next read on. Between passes. Raises Cancelled."""
        ram = self.residency.ram
        if unit_id in ram.held:
            self._release(Step(StepKind.RELEASE, unit_id=unit_id, slot_id=ram.held[unit_id]))
        ram.keep(unit_id)
        self._homes[unit_id] = home
        self._is_settled = False

    def move_out(self, unit_id: UnitId, slot_class: int) -> None:
        """The unit streams through slots of this class from now on, and nothing touches its home any more. Between
        passes. Raises Cancelled, in which case it has not moved.
        """
        for tier in Tier:
            if (tier, unit_id) in self._arrivals:
                self._wait(self._arrivals[tier, unit_id].handle)
        self._arrivals.pop((Tier.RAM, unit_id), None)
        self.residency.ram.let_pass(unit_id, slot_class)
        del self._homes[unit_id]
        self._is_settled = False

    def place_of(self, unit_id: UnitId) -> Place | DevicePlace:
        """Where the stage of a unit that has arrived computes with it."""
        return self._arrivals[self.residency.tier_of(unit_id), unit_id].place

    def _do(self, step: Step) -> None:
        self._others[step.kind](self, step)

    def _read(self, step: Step) -> None:
        self.residency.apply(step)
        unit = self._units[step.unit_id] if step.unit_id < len(self._units) else self._experts.unit(step.unit_id)
        place, after = self._ram.of(step), self._copying.pop(step.slot_id, None)
        is_guess = step.kind is StepKind.GUESS
        handle = self._transfer.submit(unit.layout.reads, place, unit.label, after, is_guess=is_guess)
        self._arrivals[Tier.RAM, unit.unit_id] = _Arrival(unit, handle, place)
        self.stats.num_reads += 1
        self.stats.bytes_read += unit.num_bytes

    def _copy(self, step: Step) -> None:
        self.residency.apply(step)
        unit, target = self._units[step.unit_id], self._device.places.of(step)
        source = self._arrivals[Tier.RAM, unit.unit_id]
        assert isinstance(source.place, Place)
        handle = self._device.load(unit, source.place, target, [source.handle])
        self._arrivals[Tier.DEVICE, unit.unit_id] = _Arrival(unit, handle, target, source.handle)
        self.stats.bytes_copied += unit.num_bytes

    def _compute(self, step: Step, compute: Compute) -> None:
        unit = self._unit_of_stage.get(step.stage_idx)
        place = None
        if unit is not None:
            arrival = self._arrivals[self.residency.tier_of(unit.unit_id), unit.unit_id]
            self._await(arrival.handle, unit.label, arrival.source)
            place = arrival.place
        if self._kv_loads and (load := self._kv_loads.pop(step.turn, None)) is not None:
            self._await(load, "keys and values")
        begin = self._clock.now()
        compute(step, place)
        self._end_compute(unit.label if unit else "pass", begin)

    def _end_compute(self, label: str, begin: float) -> None:
        end = self._clock.now()
        self.stats.compute_s += end - begin
        self._tracer.zone("compute", label, begin, end)

    def _route(self, step: Step) -> None:
        for late in self._experts.steps(step.stage_idx, self._is_here):
            self._do(late)

    def _is_here(self, unit_id: UnitId) -> bool:
        arrival = self._arrivals.get((Tier.RAM, unit_id))
        return arrival is not None and arrival.handle.is_done

    def _compute_experts(self, step: Step) -> None:
        arrivals = [self._arrivals[Tier.RAM, unit_id] for unit_id in step.units]
        for arrival in arrivals:
            self._await(arrival.handle, arrival.unit.label)
        begin = self._clock.now()
        self._experts.compute(step, [(arrival.unit, _in_ram(arrival.place)) for arrival in arrivals])
        self._end_compute(arrivals[0].unit.label if len(arrivals) == 1 else "experts", begin)

    def _hurry(self, step: Step) -> None:
        self._transfer.hurry(self._arrivals[Tier.RAM, step.unit_id].handle)

    def _drop(self, step: Step) -> None:
        arrival = self._arrivals[Tier.RAM, step.unit_id]
        if self._transfer.drop(arrival.handle):
            del self._arrivals[Tier.RAM, step.unit_id]
            self.residency.apply(step)
            self.stats.num_reads -= 1
            self.stats.bytes_read -= arrival.unit.num_bytes

    def _release(self, step: Step) -> None:
        """A slot is free once nothing writes to it or reads from it; cancelled meanwhile, it stays held."""
        arrival = self._arrivals[step.tier, step.unit_id]
        copy = self._arrivals.get((Tier.DEVICE, step.unit_id)) if step.tier is Tier.RAM else None
        if copy is not None and copy.source is arrival.handle and not copy.handle.is_done:
            self._copying[self.residency.ram.held[step.unit_id]] = copy.handle  # whoever reads into it next waits
        else:
            self._wait(arrival.handle)
        del self._arrivals[step.tier, step.unit_id]
        self.residency.apply(step)

    def _load_kv(self, step: Step) -> None:
        self._kv_loads[step.turn] = self._device.load_kv(*step.turn)

    def _save_kv(self, step: Step) -> None:
        self._newest_kv_save = self._device.save_kv(*step.turn)

    def _wait_for_all(self, step: Step) -> None:
        for arrival in list(self._arrivals.values()):
            self._await(arrival.handle, arrival.unit.label, arrival.source)
        for handle in (*self._kv_loads.values(), self._newest_kv_save):
            if handle is not None:
                self._await(handle, "keys and values")

    _others: ClassVar = {
        StepKind.READ: _read,
        StepKind.GUESS: _read,
        StepKind.HURRY: _hurry,
        StepKind.DROP: _drop,
        StepKind.ROUTE: _route,
        StepKind.EXPERTS: _compute_experts,
        StepKind.COPY: _copy,
        StepKind.RELEASE: _release,
        StepKind.KV_LOAD: _load_kv,
        StepKind.KV_SAVE: _save_kv,
        StepKind.BARRIER: _wait_for_all,
    }

    def _await(self, handle: Handle, label: str, source: Handle | None = None) -> None:
        """Raises what the transfer met."""
        if not handle.is_done:
            self._stall(handle, label, source)
        handle.wait(0)

    def _stall(self, handle: Handle, label: str, source: Handle | None = None) -> float:
        """Wait, and note why. Returns seconds."""
        begin = self._clock.now()
        self._wait(handle)
        end = self._clock.now()
        self.stats.num_bubbles += 1
        for cause, seconds in _causes(handle, source, begin, end).items():
            self.stats.stall_s[cause] += seconds
        self._tracer.zone("compute", f"wait for {label}", begin, end)
        return end - begin

    def _wait(self, handle: Handle) -> None:
        if not handle.is_done:
            handle.wait_unless(self._is_aborted)


def _in_ram(place: Place | DevicePlace) -> Place:
    assert isinstance(place, Place), "experts compute on the CPU"
    return place


def _causes(handle: Handle, source: Handle | None, begin: float, end: float) -> dict[StallCause, float]:
    """Split the wait [begin, end] by what the transfer was doing; a copy first waits for the read it copies from."""
    started = _within(handle.started_s, begin, end)
    if source is not None:
        return _causes(source, None, begin, started) | {StallCause.COPY: end - started}
    was_read = _within(handle.read_s, started, end)
    return {StallCause.QUEUE: started - begin, StallCause.DISK: was_read - started, StallCause.REPACK: end - was_read}


def _within(time_s: float | None, begin: float, end: float) -> float:
    return min(max(end if time_s is None else time_s, begin), end)
