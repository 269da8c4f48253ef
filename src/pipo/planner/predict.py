"""How fast a placement will be: its schedule simulated over a machine's figures, from the cold start on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipo.base.machine import MachineProfile
from pipo.planner.cost import PassLoad, StageCost, step_costs
from pipo.planner.placement import Placement
from pipo.planner.residency import Need, Pool, Residency, SlotId, UnitId
from pipo.planner.schedule import Schedule
from pipo.planner.simulate import Forecast, Line, StepCosts

# seconds from one pass's logits to the next one's first graph: sampling, detokenising, handing over (docs/log.md)
BETWEEN_PASSES_S = 0.0003


@dataclass(frozen=True, slots=True)
class Workload:
    """What an engine is planned for: prompts and answers of so many tokens, `num_sequences` at a time."""

    prompt_tokens: int
    answer_tokens: int
    num_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """`ttft_s` from a cold start, reading what stays in RAM included. `decode`: one pass in the middle of an answer."""

    ttft_s: float
    decode: Forecast
    workload: Workload

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


def predict(
    shapes: Shapes, placement: Placement, machine: MachineProfile, workload: Workload, schedule: Schedule
) -> Prediction:
    needs = [Need(i, stage.unit_id) for i, stage in enumerate(shapes.stages)]
    line = Line(needs, schedule, residency_of(placement))
    is_whole = all(placement.resident)
    ttft_s = sum(
        line.run_pass(_costs(shapes, machine, load, is_whole))
        for load in _prefill_loads(workload, placement.chunk.num_tokens)
    )
    positions = workload.prompt_tokens + workload.answer_tokens / 2
    load = PassLoad(workload.num_sequences, 1, positions)
    return Prediction(ttft_s, line.forecast(_costs(shapes, machine, load, is_whole)), workload)


def forecast(
    shapes: Shapes, placement: Placement, machine: MachineProfile, load: PassLoad, schedule: Schedule
) -> Forecast:
    """A pass among many of this load."""
    needs = [Need(i, stage.unit_id) for i, stage in enumerate(shapes.stages)]
    line = Line(needs, schedule, residency_of(placement))
    return line.forecast(_costs(shapes, machine, load, all(placement.resident)))


def residency_of(placement: Placement) -> Residency:
    """Before the first pass: nothing has been read. Units are numbered as in the demand."""
    free: list[deque[SlotId]] = []
    first = 0
    for slot_class in placement.slots:
        free.append(deque(SlotId(first + i) for i in range(slot_class.num_slots)))
        first += slot_class.num_slots
    streamed = {UnitId(i): placement.slot_class[i] for i, stays in enumerate(placement.resident) if not stays}
    resident = {UnitId(i) for i, stays in enumerate(placement.resident) if stays}
    return Residency(Pool(streamed, free, resident))


def _prefill_loads(workload: Workload, chunk_tokens: int) -> Iterator[PassLoad]:
    """A row of the chunk sees all positions before the chunk and half of the chunk, on average."""
    for start in range(0, workload.prompt_tokens, chunk_tokens):
        tokens = min(chunk_tokens, workload.prompt_tokens - start)
        for _ in range(workload.num_sequences):
            yield PassLoad(1, tokens, start + tokens / 2)


def _costs(shapes: Shapes, machine: MachineProfile, load: PassLoad, is_whole: bool) -> StepCosts:
    costs = step_costs(shapes.stages, machine, load, shapes.hidden_size)
    if is_whole:  # one graph for all stages
        start_s = machine.cpu.graph_start_s
        costs = replace(costs, compute={stage: seconds - start_s for stage, seconds in costs.compute.items()})
    return replace(costs, between_passes=BETWEEN_PASSES_S)
