"""How fast a placement will be: its schedule simulated over a machine's figures, from the cold start on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipo.base.machine import MachineProfile
from pipo.planner.cost import PassLoad, StageCost, beside_each_other, expert_bytes, expert_costs, step_costs
from pipo.planner.device_placement import DevicePlacement
from pipo.planner.experts import ASSUMED, ExpectedRouting
from pipo.planner.placement import Placement, SlotClass
from pipo.planner.residency import Need, Pool, Residency, UnitId, numbered_slots
from pipo.planner.schedule import Schedule
from pipo.planner.simulate import Forecast, Line, StepCosts

# seconds from one pass's logits to the next one's first graph: sampling, detokenising, handing over (docs/log.md)
BETWEEN_PASSES_S = 0.0003
FEW_ROWS = 16  # up to which a pass and the drive are taken to slow each other as with one row (docs/log.md)
COLD_PASSES = 3  # of a prefill, simulated one by one: what stays arrives, the slots fill
LIKE_PASSES = 6  # simulated of the rest; each stands for those around it, which differ in the positions they see


@dataclass(frozen=True, slots=True)
class Workload:
    """What an engine is planned for: prompts and answers of so many tokens, `num_sequences` at a time."""

    prompt_tokens: int
    answer_tokens: int
    num_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """`ttft_s` from a cold start, reading what stays in RAM included, until the last prompt has been read. `decode`:
    one pass in the middle of an answer.
    """

    ttft_s: float
    decode: Forecast
    workload: Workload
    expert_bytes: float = 0.0  # read for a pass of decode
    routing: ExpectedRouting | None = None  # of a mixture: what that was taken from

    @property
    def tokens_per_s(self) -> float:
        """Of decode, all sequences together."""
        return self.workload.num_sequences / self.decode.seconds

    @property
    def total_s(self) -> float:
        """One whole request: the prompt from cold, then the answer."""
        return self.ttft_s + (self.workload.answer_tokens - 1) * self.decode.seconds


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the planner knows of a model besides sizes: its stages in order, and what passes between them."""

    stages: Sequence[StageCost]
    hidden_size: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on a machine: who lives where in RAM and, where one computes, on the machine's first device.

    `decode_threads` compute a pass of one token on the CPU; None: all there are.
    """

    shapes: Shapes
    machine: MachineProfile
    ram: Placement
    device: DevicePlacement | None = None
    decode_threads: int | None = None
    routing: ExpectedRouting = ASSUMED

    def at(self, num_positions: float) -> Placed:
        """While the KV cache holds so many positions of each sequence."""
        return replace(self, ram=self.ram.at(num_positions))

    @property
    def on_device(self) -> frozenset[int]:
        """The stages that compute there: routed experts never do. One without weights computes where the next one
        does.
        """
        if self.device is None:
            return frozenset()
        found, is_there = set(), False
        for i in reversed(range(len(self.shapes.stages))):
            if self.shapes.stages[i].experts is not None:
                continue
            unit = self.shapes.stages[i].unit_id
            is_there = self.device.computes[unit] if unit is not None else is_there
            found |= {i} if is_there else set()
        return frozenset(found)

    @property
    def moves_kv(self) -> bool:
        return self.kv_sequences > 0

    @property
    def kv_sequences(self) -> int:
        """Whose keys and values move to the device at a time; 0: they do not move."""
        return self.device.kv_sequences if self.device is not None else 0

    @property
    def streamed_to_device(self) -> list[UnitId]:
        """The units that are copied there in every pass."""
        if self.device is None:
            return []
        facts = zip(self.device.computes, self.device.resident, strict=True)
        return [UnitId(i) for i, (computes, stays) in enumerate(facts) if computes and not stays]

    @property
    def _read_in_every_pass(self) -> list[UnitId]:
        there = self.device.resident if self.device else (False,) * len(self.ram.resident)
        stays = [in_ram or on_device for in_ram, on_device in zip(self.ram.resident, there, strict=True)]
        return [UnitId(i) for i, is_kept in enumerate(stays) if not is_kept]

    @property
    def is_one_graph(self) -> bool:
        """All stages stay on one side, which then computes a pass as a whole."""
        if any(stage.experts is not None for stage in self.shapes.stages):
            return False
        if self.device is None:
            return all(self.ram.resident)
        return self.device.is_all and all(self.device.resident) and not self.moves_kv

    def line(self, schedule: Schedule) -> Line:
        """Before the first pass."""
        there = self.on_device
        needs = [
            Need(
                i,
                stage.unit_id,
                int(self.moves_kv and i in there and stage.kv_bytes_per_position > 0),
                is_routed=stage.experts is not None,
            )
            for i, stage in enumerate(self.shapes.stages)
        ]
        return Line(needs, schedule, residency_of(self.ram, self.device))

    def costs(self, load: PassLoad) -> StepCosts:
        there = self.on_device
        shapes = self.shapes
        costs = step_costs(shapes.stages, self.machine, load, shapes.hidden_size, there, self.kv_sequences)
        if self.is_one_graph:
            start_s = self.machine.devices[1 if there else 0].graph_start_s
            costs = replace(costs, compute={stage: seconds - start_s for stage, seconds in costs.compute.items()})
        experts = expert_costs(self.shapes.stages, self.machine, load, self.routing, self.ram.held_share)
        costs = replace(costs, experts=experts)
        use = self.machine.shared_use(self.decode_threads if load.num_tokens == 1 else None)
        if use is not None and load.num_tokens <= FEW_ROWS:
            costs = beside_each_other(costs, use, self._read_in_every_pass)
        return replace(costs, between_passes=BETWEEN_PASSES_S)


def predict(placed: Placed, workload: Workload, schedule: Schedule) -> Prediction:
    """All prompts, then one pass in the middle of the answers."""
    ttft_s = _prefill_s(placed.at(workload.prompt_tokens), schedule, workload)
    load = decode_load(workload)
    read = expert_bytes(placed.shapes.stages, load, placed.routing, placed.at(load.num_positions).ram.held_share)
    routing = placed.routing if any(stage.experts for stage in placed.shapes.stages) else None
    return Prediction(ttft_s, forecast(placed, load, schedule), workload, read, routing)


def forecast(placed: Placed, load: PassLoad, schedule: Schedule) -> Forecast:
    """A pass among many of this load."""
    there = placed.at(load.positions_held)
    return there.line(schedule).forecast(there.costs(load))


def decode_load(workload: Workload) -> PassLoad:
    """A pass half-way through the answers."""
    return PassLoad(workload.num_sequences, 1, workload.prompt_tokens + workload.answer_tokens / 2)


def residency_of(placement: Placement, device: DevicePlacement | None = None) -> Residency:
    """Before the first pass: nothing has been read. Units are numbered as in the demand."""
    ram = _pool(placement.resident, placement.slot_class, placement.slots)
    if device is None:
        return Residency(ram)
    there = frozenset(UnitId(i) for i, computes in enumerate(device.computes) if computes)
    return Residency(ram, _pool(device.resident, device.slot_class, device.slots, there), there)


def _pool(
    stays: Sequence[bool], slot_class: Sequence[int], slots: Sequence[SlotClass], units: frozenset[UnitId] | None = None
) -> Pool:
    """Of these units, all where None is named."""
    ours = [UnitId(i) for i in range(len(stays)) if units is None or i in units]
    classes = {unit: slot_class[unit] for unit in ours if not stays[unit]}
    return Pool(classes, numbered_slots([each.num_slots for each in slots]), {unit for unit in ours if stays[unit]})


def _prefill_s(placed: Placed, schedule: Schedule, workload: Workload) -> float:
    """Seconds until the last prompt has been read. Cost: COLD_PASSES and LIKE_PASSES simulated at most."""
    line = placed.line(schedule)

    def run(loads: Sequence[PassLoad]) -> float:
        return sum(line.run_pass(placed.costs(load)) * count for load, count in _thinned(loads))

    loads = list(_prefill_loads(workload, placed.ram.chunk.num_tokens))
    return sum(line.run_pass(placed.costs(load)) for load in loads[:COLD_PASSES]) + run(loads[COLD_PASSES:])


def _thinned(loads: Sequence[PassLoad]) -> Iterator[tuple[PassLoad, int]]:
    """Up to LIKE_PASSES of the loads, and how many each stands for."""
    per_group = -(-len(loads) // LIKE_PASSES) or 1
    for first in range(0, len(loads), per_group):
        group = loads[first : first + per_group]
        yield group[len(group) // 2], len(group)


def _prefill_loads(workload: Workload, chunk_tokens: int) -> Iterator[PassLoad]:
    """Of all sequences: short prompts share a chunk, long ones have theirs one after another. A row of the chunk sees
    all positions of its sequence before the chunk and half of the chunk's, on average.
    """
    num_together = min(max(chunk_tokens // workload.prompt_tokens, 1), workload.num_sequences)
    for first in range(0, workload.num_sequences, num_together):
        num_sequences = min(num_together, workload.num_sequences - first)
        for start in range(0, workload.prompt_tokens, chunk_tokens):
            tokens = min(chunk_tokens, workload.prompt_tokens - start)
            yield PassLoad(num_sequences, tokens, start + tokens / 2)
