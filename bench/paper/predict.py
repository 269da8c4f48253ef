"""A model, a policy, a system and a schedule become needs, residency and costs; `pipo.planner` walks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.paper.policy import KvHome, Policy
from bench.paper.shapes import Shape, stages
from bench.paper.systems import System
from pipo.planner.cost import PassLoad, StageCost, stage_seconds, step_costs
from pipo.planner.residency import Need, Pool, Residency, UnitId, empty_pool, numbered_slots
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Forecast, Lane, Line, StepCosts

NUM_CLASSES = 3  # attention, MLP, embedding
_walked: dict[str, Forecast] = {}


@dataclass(frozen=True, slots=True)
class Job:
    """What is run: prompts of equal length, all their tokens in one prefill pass, then one token a pass."""

    shape: Shape
    policy: Policy
    system: System
    prompt_tokens: int
    output_tokens: int
    slots_per_class: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """`prefill` and `decode` are one pass of each. `device_share`: of a decode stage's compute, what the device does;
    the CPU's attention is the rest.
    """

    tokens_per_s: float
    seconds: float
    prefill: Forecast
    decode: Forecast
    num_decodes: int
    device_share: float

    def busy(self, lane: Lane) -> float:
        """Share of the whole run, 0 to 1."""
        return (self.prefill.busy[lane] + self.num_decodes * self.decode.busy[lane]) / self.seconds

    @property
    def device_busy(self) -> float:
        """Share of the whole run in which the device computes."""
        decode = self.num_decodes * self.decode.busy[Lane.DEVICE] * self.device_share
        return (self.prefill.busy[Lane.DEVICE] + decode) / self.seconds

    @property
    def device_busy_in_decode(self) -> float:
        return self.decode.share(Lane.DEVICE) * self.device_share


def predict(job: Job, schedule: str) -> Prediction:
    """Tokens generated in a second of the whole run, prefill included."""
    decode_costs, device_share = costs(job, is_prefill=False)
    prefill_costs, _ = costs(job, is_prefill=True)
    prefill, decode = (_steady_pass(job, schedule, each) for each in (prefill_costs, decode_costs))
    num_decodes = job.output_tokens - 1
    seconds = prefill.seconds + num_decodes * decode.seconds
    tokens = job.policy.batch * job.output_tokens
    return Prediction(tokens / seconds, seconds, prefill, decode, num_decodes, device_share)


def _steady_pass(job: Job, schedule: str, seconds: StepCosts) -> Forecast:
    """Every pass after the first takes the same time, so one is enough. Walked once for the same job and costs: most
    figures that a sensitivity table varies touch few of the cells.
    """
    key = repr((job.shape, job.policy, job.slots_per_class, schedule, seconds))
    if key not in _walked:
        line = Line(needs(job), SCHEDULES[schedule], residency(job))
        _walked[key] = line.forecast(seconds, num_warm=1, num_passes=1)
    return _walked[key]


def needs(job: Job) -> list[Need]:
    moves_kv = job.policy.kv is not KvHome.DEVICE
    return [
        Need(i, stage.unit_id, moves_kv and stage.kv_bytes_per_position > 0) for i, stage in enumerate(_stages(job))
    ]


def _stages(job: Job) -> list[StageCost]:
    return stages(job.shape, job.policy.weight_type, job.policy.kv_type)


def residency(job: Job) -> Residency:
    """Everything is where it lives. A share of a unit that stays makes its moves shorter, not fewer."""
    units = [stage.unit_id for stage in _stages(job) if stage.unit_id is not None]
    moves, reads = job.policy.on_device < 1, job.policy.on_disk > 0
    ram, device = (_pool(units if passes else [], job.slots_per_class) for passes in (reads, moves))
    return Residency(ram, device, frozenset(units))


def _pool(units: Sequence[UnitId], slots_per_class: int) -> Pool:
    if not units:
        return empty_pool()
    classes = {unit: 2 if unit in (units[0], units[-1]) else (i + 1) % 2 for i, unit in enumerate(units)}
    return Pool(classes, numbered_slots([slots_per_class] * NUM_CLASSES), set())


def costs(job: Job, is_prefill: bool) -> tuple[StepCosts, float]:
    """Seconds of the steps of a pass, and the device's share of its compute."""
    each = job.prompt_tokens if is_prefill else 1
    positions = job.prompt_tokens if is_prefill else job.prompt_tokens + job.output_tokens / 2
    load = PassLoad(job.policy.micro_batch, each, positions)
    model, hidden = _stages(job), job.shape.hidden_size
    base = step_costs(model, job.system.machine, load, hidden, frozenset(range(len(model))))
    compute, device_s = _compute(job, model, base.compute, load, is_prefill)
    new_s, cached_s = _kv_seconds(job, model, load)
    drive_s = _kv_on_drive(job, model, load, is_prefill)
    hidden_s = _hidden_seconds(job, load)
    step = replace(
        base,
        compute=compute,
        read={u: _read_seconds(job, stage) + drive_s.get(u, 0.0) for u, stage in _by_unit(model).items()},
        copy={u: _copy_seconds(job, stage) + hidden_s for u, stage in _by_unit(model).items()},
        kv_load={} if is_prefill or job.policy.cpu_attention else cached_s,
        kv_save=new_s,
    )
    return step, device_s / sum(compute.values())


def _by_unit(model: Sequence[StageCost]) -> dict[UnitId, StageCost]:
    return {stage.unit_id: stage for stage in model if stage.unit_id is not None}


def _read_seconds(job: Job, stage: StageCost) -> float:
    return stage.unit_bytes * job.policy.on_disk / job.system.read


def _copy_seconds(job: Job, stage: StageCost) -> float:
    return stage.unit_bytes * (1 - job.policy.on_device) / job.system.copy


def _compute(
    job: Job, model: Sequence[StageCost], once: Mapping[int, float], load: PassLoad, is_prefill: bool
) -> tuple[dict[int, float], float]:
    """Of all micro-batches, and how much of it the device does. A prompt's head computes one row a sequence."""
    policy, machine = job.policy, job.system.machine
    head = len(model) - 1
    device_s = dict(once) | {head: stage_seconds(model[head], machine.devices[1], replace(load, tokens_each=1))}
    cpu_s = dict.fromkeys(device_s, 0.0)
    if policy.cpu_attention and not is_prefill:
        for i, stage in enumerate(model):
            on_device = machine.devices[1].attention_s(stage.work, 1, load.num_positions)
            device_s[i] -= on_device * load.num_sequences
            cpu_s[i] = machine.cpu.attention_s(stage.work, 1, load.num_positions) * load.num_sequences
    compute = {i: (seconds + cpu_s[i]) * policy.num_micro_batches for i, seconds in device_s.items()}
    return compute, sum(device_s.values()) * policy.num_micro_batches


def _kv_seconds(job: Job, model: Sequence[StageCost], load: PassLoad) -> tuple[dict[int, float], dict[int, float]]:
    """Of saving what is new and loading what is cached, over the link, by stage."""
    new_tokens = load.tokens_each * job.policy.batch
    cached = load.num_positions * job.policy.batch
    kv_bytes = {i: stage.kv_bytes_per_position for i, stage in enumerate(model) if stage.kv_bytes_per_position}
    new_s = {i: num_bytes * new_tokens / job.system.kv_save for i, num_bytes in kv_bytes.items()}
    return new_s, {i: num_bytes * cached / job.system.kv_load for i, num_bytes in kv_bytes.items()}


def _kv_on_drive(job: Job, model: Sequence[StageCost], load: PassLoad, is_prefill: bool) -> dict[UnitId, float]:
    """Of reading what is cached and writing what is new, while the drive reads the stage's weights."""
    if job.policy.kv is not KvHome.DISK:
        return {}
    read = 0.0 if is_prefill else load.num_positions / job.system.read
    per_byte = job.policy.batch * (read + load.tokens_each / job.system.write)
    return {unit: stage.kv_bytes_per_position * per_byte for unit, stage in _by_unit(model).items()}


def _hidden_seconds(job: Job, load: PassLoad) -> float:
    """Activations on their way to the device. Their way back is of the same size and beside it: left out."""
    if not job.policy.hidden_in_ram:
        return 0.0
    return 2 * job.shape.hidden_size * load.tokens_each * job.policy.batch / job.system.copy
