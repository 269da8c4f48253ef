"""Seconds of every step of a pass, from what a machine can do and what the model's stages are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipo.base.machine import ComputeProfile, LinkProfile, MachineProfile, SharedUse, StageWork
from pipo.base.tensor_type import TensorType
from pipo.planner.experts import ExpectedRouting, ExpertWork
from pipo.planner.residency import UnitId
from pipo.planner.simulate import ExpertCosts, StepCosts


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage as the planner sees it: what it computes, and the unit it computes with (None: always there).

    `repacked_as` is the type whose rows are repacked while they are read. `kv_bytes_per_position` is what a cached
    position takes for an attention stage. `is_head` computes the newest row of each sequence alone.
    """

    work: StageWork
    unit_id: UnitId | None
    unit_bytes: int = 0
    repacked_as: TensorType | None = None
    kv_bytes_per_position: int = 0
    is_head: bool = False
    experts: ExpertWork | None = None


@dataclass(frozen=True, slots=True)
class PassLoad:
    """What one pass computes: `num_sequences`, each with `tokens_each` new tokens, of which every one sees
    `num_positions` on average: those before the pass and half of the pass's own. `others` share the pass: chunks of
    prompts beside a token of each answer, say; their attention is their own, products are over the rows of all.
    """

    num_sequences: int = 1
    tokens_each: int = 1
    num_positions: float = 0.0
    others: tuple[PassLoad, ...] = ()  # which have none themselves

    @property
    def groups(self) -> tuple[PassLoad, ...]:
        """This one and the others, each by itself."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    def parts(self, num_sequences: int) -> tuple[PassLoad, ...]:
        """Of so many sequences at most, what each has; 0: all of them together."""
        if not num_sequences or self.num_rows_of_head <= num_sequences:
            return (self,)
        return tuple(
            replace(each, num_sequences=min(num_sequences, each.num_sequences - first))
            for each in self.groups
            for first in range(0, each.num_sequences, num_sequences)
        )

    @property
    def num_tokens(self) -> int:
        return sum(each.num_sequences * each.tokens_each for each in self.groups)

    @property
    def num_rows_of_head(self) -> int:
        """The newest of each sequence."""
        return sum(each.num_sequences for each in self.groups)

    @property
    def cached_positions(self) -> float:
        """Of all sequences, before the pass: those whose keys and values have to be there when it begins."""
        return sum(each.num_sequences * max(each.num_positions - each.tokens_each / 2, 0.0) for each in self.groups)

    @property
    def positions_held(self) -> float:
        """Of a sequence, on average, after the pass."""
        held = sum(each.num_sequences * (each.num_positions + each.tokens_each / 2) for each in self.groups)
        return held / self.num_rows_of_head


def step_costs(
    stages: Sequence[StageCost],
    machine: MachineProfile,
    load: PassLoad,
    hidden_size: int,
    on_device: frozenset[int] = frozenset(),
    kv_sequences: int = 0,
) -> StepCosts:
    """`on_device` are the indices of the stages that compute on the machine's first device beside the CPU; where keys
    and values move there, so many sequences have theirs there at a time.
    """
    device = machine.devices[1] if on_device else None
    up, down = (device.from_host, device.to_host) if device else (None, None)
    unit_bytes = {stage.unit_id: stage.unit_bytes for stage in stages if stage.unit_id is not None}
    kv_bytes = {i: stage.kv_bytes_per_position for i, stage in enumerate(stages) if stage.kv_bytes_per_position}
    parts = load.parts(kv_sequences)
    split = kv_bytes.keys() & on_device if len(parts) > 1 else frozenset[int]()
    hidden_bytes = 4 * hidden_size * load.num_tokens
    num_experts = max((stage.experts.num_experts for stage in stages if stage.experts is not None), default=0)
    score_bytes = 4 * num_experts * load.num_tokens
    return StepCosts(
        read={s.unit_id: machine.unit_read_s(s.unit_bytes, s.repacked_as) for s in stages if s.unit_id is not None},
        compute={
            i: _mean_seconds(
                stage, device if device and i in on_device else machine.cpu, parts if i in split else (load,)
            )
            for i, stage in enumerate(stages)
        },
        copy={unit: _seconds(up, size) for unit, size in unit_bytes.items()},
        kv_load={i: _seconds(up, size * load.cached_positions / len(parts)) for i, size in kv_bytes.items()},
        kv_save={i: _seconds(down, size * load.num_tokens / len(parts)) for i, size in kv_bytes.items()},
        on_device=on_device,
        handover=max(_seconds(up, hidden_bytes), _seconds(down, hidden_bytes)),
        # the hidden state, what the experts read, and the scores of two routers
        routing_handover=2 * _seconds(down, hidden_bytes) + 2 * _seconds(down, score_bytes),
        num_micro_batches=len(parts),
    )


def expert_costs(
    stages: Sequence[StageCost], machine: MachineProfile, load: PassLoad, routing: ExpectedRouting, held_share: float
) -> dict[int, ExpertCosts]:
    """Of the stages with experts, which compute on the CPU while this share of all experts is in RAM."""
    costs = {}
    for i, stage in enumerate(stages):
        if stage.experts is None:
            continue
        needed = routing.num_needed(stage.experts, load.num_tokens)
        missing = routing.num_missing(stage.experts, load.num_tokens, held_share)
        rows = max(round(load.num_tokens * stage.experts.num_experts_per_tok / needed), 1)
        one_s = machine.cpu.stage_s(stage.experts.work, rows) - machine.cpu.stage_overhead_s
        read_s = missing * machine.unit_read_s(stage.experts.num_bytes, stage.experts.repacked_as)
        costs[i] = ExpertCosts(
            read_s * routing.recall,
            read_s * (1 - routing.recall),
            (needed - missing) * one_s + machine.cpu.graph_start_s + machine.cpu.stage_overhead_s,
            missing * one_s,
        )
    return costs


def expert_bytes(stages: Sequence[StageCost], load: PassLoad, routing: ExpectedRouting, held_share: float) -> float:
    """Read for a pass."""
    return sum(
        stage.experts.num_bytes * routing.num_missing(stage.experts, load.num_tokens, held_share)
        for stage in stages
        if stage.experts is not None
    )


def beside_each_other(costs: StepCosts, use: SharedUse, streamed: Sequence[UnitId]) -> StepCosts:
    """Of a pass that computes few rows on the CPU while these units are read: each slows the other down for as long as
    both are at work, which is at most all the time of the shorter one.
    """
    ours = costs.compute.keys() - costs.on_device
    experts = costs.experts.values()
    compute_s = (sum(costs.compute[i] for i in ours) + sum(each.compute_s for each in experts)) / use.compute_share
    read_s = (sum(costs.read[unit] for unit in streamed) + sum(each.read_s for each in experts)) / use.read_share
    if not compute_s or not read_s:
        return costs
    slower = 1 + min(read_s / compute_s, 1) * (1 / use.compute_share - 1)
    drive_slower = 1 + min(compute_s / read_s, 1) * (1 / use.read_share - 1)
    return replace(
        costs,
        compute={i: seconds * (slower if i in ours else 1) for i, seconds in costs.compute.items()},
        read={unit: seconds * drive_slower for unit, seconds in costs.read.items()},
        experts={i: each.slowed(drive_slower, slower) for i, each in costs.experts.items()},
    )


def _seconds(link: LinkProfile | None, num_bytes: float) -> float:
    return link.seconds(num_bytes) if link else 0.0


def _mean_seconds(stage: StageCost, device: ComputeProfile, loads: Sequence[PassLoad]) -> float:
    seconds = sum(stage_seconds(stage, device, each) * count for each, count in Counter(loads).items())
    return seconds / len(loads)


def stage_seconds(stage: StageCost, device: ComputeProfile, load: PassLoad) -> float:
    """Every sequence has keys and values of its own; the products serve all rows at once."""
    once = device.stage_s(stage.work, load.num_rows_of_head if stage.is_head else load.num_tokens)
    return once + device.graph_start_s + attention_seconds(stage, device, load)


def attention_seconds(stage: StageCost, device: ComputeProfile, load: PassLoad) -> float:
    """Of all sequences, group by group."""
    return sum(
        each.num_sequences * device.attention_s(stage.work, each.tokens_each, each.num_positions)
        for each in load.groups
    )
