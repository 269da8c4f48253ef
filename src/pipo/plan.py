"""What an engine will do with its budgets, decided from sizes alone, before any memory is taken."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipo.base.adapter import NamedAdapter
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, UsageError
from pipo.base.machine import MachineProfile
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, PAGE_BYTES, round_down
from pipo.compute.device import ComputeDevice
from pipo.compute.devices import CpuBackend
from pipo.device_shares import DeviceShares
from pipo.generation.constraints import grammars_bytes
from pipo.hardware.cache import known_profile, tells_of_a_drive
from pipo.hardware.drive import DriveRate
from pipo.hardware.host import WIDE_SHARE, Host, ThisHost
from pipo.hardware.probe import PROBE_BYTES, Progress, Scope, probe
from pipo.kvcache.cache import ROWS_PER_PAGE
from pipo.model_file import ModelFile, process_bytes_now
from pipo.models.stage import banks_of
from pipo.native import NativeWeights, Weights
from pipo.pipeline.blueprint import CHUNKS, NARROW_DRIVE, Blueprint, choose_layouts, demand
from pipo.pipeline.device_layout import AbsentDevice
from pipo.pipeline.device_share import DeviceShare
from pipo.pipeline.stage_costs import stage_costs
from pipo.pipeline.stage_graphs import Compute
from pipo.pipeline.units import WeightLayouts
from pipo.planner.cost import PassLoad
from pipo.planner.depth import NO_STALL, TOLERANCE, best_depth, simulated_pass
from pipo.planner.experts import ASSUMED, ExpectedRouting
from pipo.planner.placement import Demand, Placement, place, smallest_bytes
from pipo.planner.predict import Placed, Prediction, Shapes, Workload, decode_load, forecast, predict
from pipo.planner.prefill_share import prefill_beside_decode
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Forecast
from pipo.transfer.disk import DriveSettings

KV_SHARE = 4  # a context nobody asked for may take this fraction of the budget for its keys and values
LEAST_CONTEXT_TOKENS = 256  # that is taken where nobody asked for one
BESIDE_PROBE_BYTES = 24 * MIB  # masks, graphs, ggml's own scratch: outside the probe's account
FIRST_DRIVE_S, FIRST_COMPUTE_S = 1.0, 3.0  # what the first plan spends on measuring; `doctor --probe` takes longer
TYPICAL = Workload(prompt_tokens=256, answer_tokens=256)  # where nobody says what is to come


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine will do with its budget, before it takes any of it."""

    placement: Placement
    context_tokens: int
    limit_bytes: int
    weight_bytes: int  # of all stages
    repacked_types: tuple[str, ...]
    drive: DriveRate
    blueprint: Blueprint = field(repr=False)
    decode_threads: int | None = None  # that compute a pass of one token on the CPU; None: all
    prediction: Prediction | None = None

    @property
    def device(self) -> DeviceShare | None:
        """What computes beside the CPU."""
        return self.blueprint.device

    @property
    def native_file(self) -> Path | None:
        """That has weights repacked for this CPU, if any are read from one."""
        specs = (spec for stage in self.blueprint.stages for spec in stage.specs)
        found = next((spec for spec in specs if spec.is_repacked), None)
        return None if found is None else self.blueprint.manifest.files[found.extent.file_idx]

    @property
    def adapters(self) -> Sequence[NamedAdapter]:
        """That the engine begins with."""
        return self.blueprint.named_adapters

    @property
    def expert_bytes(self) -> int:
        """Of all routed experts, as the file has them."""
        return sum(spec.num_bytes for bank in banks_of(self.blueprint.stages) for spec in bank.matrices.values())

    @property
    def in_use(self) -> Placement:
        """The placement half-way through an answer of the predicted workload, or, without one, at its start."""
        return self.placement.at(decode_load(self.prediction.workload).num_positions if self.prediction else 1)

    @property
    def is_streaming(self) -> bool:
        """Once the context is full, if not before."""
        return self.placement.is_streaming

    @property
    def pass_floor_s(self) -> float:
        """Seconds the drive needs for what one pass streams: no engine on this drive can be faster."""
        experts = self.prediction.expert_bytes if self.prediction else 0.0
        return (self.in_use.streamed_bytes + experts) / self.drive.bytes_per_s


class PlanMaker:
    """Plans one model on one machine. `kept_bytes` is charged besides what the model needs, by name.

    `device` is what may compute beside the CPU, `host` the machine, this one unless another is named. Takes no memory
    worth a word.
    """

    def __init__(
        self,
        model: ModelFile,
        config: EngineConfig,
        compute: Compute,
        device: ComputeDevice | AbsentDevice | None,
        host: Host | None = None,
        routing: ExpectedRouting | None = None,
        adapters: Sequence[NamedAdapter] = (),
        weights: NativeWeights | None = None,
    ) -> None:
        self.kept_bytes: dict[str, int] = {}
        if config.constraints:
            num_rows = model.manifest.hyper.vocab_size
            self.kept_bytes["constraints"] = grammars_bytes(model.tokenizer, num_rows, config.num_sequences)
        self._model = model
        self.config = config
        self._compute = compute
        self._device = device
        self._host = host or ThisHost(config)
        self._routing = routing or ASSUMED
        self._adapters = tuple(adapters)
        self._weights = weights or NativeWeights(model, compute.repack, config.layout)
        self._shares = DeviceShares(model, config, compute, device, self._host, [each.adapter for each in adapters])

    def reshaped(self, *, prefill_chunk: int, max_outputs: int) -> PlanMaker:
        """One for passes of so many tokens, and positions among them that ask for logits; all else is the same."""
        config = replace(self.config, prefill_chunk=prefill_chunk, max_outputs=max_outputs)
        shared = self._host, self._routing, self._adapters, self._weights
        other = PlanMaker(self._model, config, self._compute, self._device, *shared)
        other.kept_bytes = self.kept_bytes
        return other

    def make(
        self,
        context_tokens: int | None = None,
        workload: Workload | None = None,
        machine: MachineProfile | None = None,
    ) -> Plan:
        """The context (this, else the config's, else the roomiest that fits) bounds prompt plus answer. With a workload
        and a machine the plan is the one predicted to serve the workload soonest.

        Raises OverBudget naming the smallest `--ram` or `--vram` that works; UsageError for a context the model was
        not made for, or a budget that cannot be read.
        """
        limit = self._host.ram_bytes()
        context = context_tokens or self.config.context_tokens
        trained = self._model.manifest.hyper.context_tokens
        if context is not None and context > trained:
            raise UsageError(
                f"a context of {context} tokens exceeds the {trained} the model was trained for",
                hint=f"-c {trained} is the most",
            )
        plan = self._plan_at(context, limit) if context is not None else self._plan_roomiest(limit, trained)
        if workload is None or machine is None or not _knows_device(machine, plan):
            return plan
        return self._best(plan, workload, machine)

    def machine(
        self, on_probe: Progress = lambda step, fraction: None, before: Callable[[], object] = lambda: None
    ) -> MachineProfile | None:
        """The profile of this machine, measured now, after `before`, where no earlier one serves: some seconds, of
        which `on_probe` hears. None where the budget or the file is too small to tell of anything. Computes on this
        thread.
        """
        model, config, device = self._model, self.config, self._device
        files = model.manifest.files
        types = {spec.type for stage in model.stages for spec in stage.specs}
        room = self._host.ram_bytes() - self._process_bytes() - BESIDE_PROBE_BYTES
        limit = round_down(min(room, PROBE_BYTES), PAGE_BYTES)
        if not tells_of_a_drive(files) or limit < Scope(files, sorted(types)).least_bytes:
            return None

        def measure(wanted: Sequence[TensorType]) -> MachineProfile:
            before()
            scope = Scope(files, wanted, limit_bytes=limit, drive_s=FIRST_DRIVE_S, compute_s=FIRST_COMPUTE_S)
            assert isinstance(self._compute.backend, CpuBackend)
            assert not isinstance(device, AbsentDevice)
            return probe(self._compute.lib, self._compute.backend, self._compute.repack, scope, on_probe, device)

        kind = probe_kind(device, limit)
        return known_profile(files, self._compute.lib, config.num_threads, sorted(types), measure, kind=kind).profile

    def _best(self, plan: Plan, workload: Workload, machine: MachineProfile) -> Plan:
        """The one that serves the workload soonest: first of this plan and those with another share of the device, then
        of that one's other layouts and prefill chunks.
        """

        def predicted(plans: Iterable[Plan]) -> list[Plan]:
            return [replace(each, prediction=self._predict(each, workload, machine)) for each in plans]

        best = min(_soonest(predicted([plan, *self._device_variants(plan)])), key=_copied_bytes)
        if not best.is_streaming:
            return best
        best = min(predicted([best, *self._variants(best)]), key=_request_s)
        threads = [self._with_best_depth(each, workload, machine) for each in self._thread_variants(best, machine)]
        return min(_soonest(predicted(threads)), key=_stall_share)

    def _thread_variants(self, plan: Plan, machine: MachineProfile) -> Iterator[Plan]:
        """Where nobody said how many threads: also with a core left to the workers that read."""
        yield plan
        if self.config.threads is None:
            for use in machine.shared_uses:
                if use.num_threads < machine.cpu.num_threads:
                    yield replace(plan, decode_threads=use.num_threads)

    def _with_best_depth(self, plan: Plan, workload: Workload, machine: MachineProfile) -> Plan:
        """With the fewest slots that decode has no avoidable stall with, where such slots do not cost more."""
        wanted = self._demand(plan.blueprint, plan.context_tokens, plan.limit_bytes)
        schedule = SCHEDULES[self.config.schedule]
        simulate = simulated_pass(self.placed(plan, machine), wanted, decode_load(workload), schedule)
        return replace(plan, placement=best_depth(wanted, plan.placement, simulate))

    def _variants(self, plan: Plan) -> Iterator[Plan]:
        """The same limits with other choices; those that do not fit are left out."""
        blueprints = [plan.blueprint]
        if self.config.layout == "auto" and plan.repacked_types:
            blueprints.append(_over(plan.blueprint, self._weights.plain, WeightLayouts(frozenset())))
        for blueprint in blueprints:
            wanted = self._demand(blueprint, plan.context_tokens, plan.limit_bytes)
            for chunk in wanted.chunks:
                with suppress(OverBudget):
                    placement = place(replace(wanted, chunks=[chunk]))
                    yield self._plan_of(blueprint, placement, plan.context_tokens, plan.limit_bytes)

    def _device_variants(self, plan: Plan) -> Iterator[Plan]:
        """More or less of the model on the device, and, where nobody asked for one, nothing."""
        if plan.device is None:
            return
        shares: list[DeviceShare | None] = [*self._shares.few(plan.context_tokens)]
        if self.config.device == "auto" and self.config.compute == "auto":
            shares.append(None)
        for share in shares:
            with suppress(OverBudget):
                yield self._plan_with(share, plan.context_tokens, plan.limit_bytes)

    def _predict(self, plan: Plan, workload: Workload, machine: MachineProfile) -> Prediction:
        return predict(self.placed(plan, machine), workload, SCHEDULES[self.config.schedule])

    def forecast(self, plan: Plan, load: PassLoad, machine: MachineProfile) -> Forecast:
        """A pass among many of this load."""
        return forecast(self.placed(plan, machine), load, SCHEDULES[self.config.schedule])

    def prefill_beside_decode(self, plan: Plan, machine: MachineProfile | None) -> int | None:
        """Tokens of prompts that may share a pass with sequences that decode; None: as many as fit."""
        most = plan.placement.chunk.num_tokens
        if machine is None or plan.prediction is None or self.config.num_sequences == 1:
            return None
        load = replace(decode_load(plan.prediction.workload), num_sequences=self.config.num_sequences)
        chunks = [chunk for chunk in CHUNKS if chunk <= most] or [most]
        return prefill_beside_decode(lambda each: self.forecast(plan, each, machine), load, chunks)

    def placed(self, plan: Plan, machine: MachineProfile) -> Placed:
        """The plan as the planner's arithmetic sees it."""
        hyper, kv = self._model.manifest.hyper, plan.blueprint.kv_shape(plan.context_tokens)
        types, adapters = (kv.type_k, kv.type_v), plan.blueprint.adapters
        costs = stage_costs(plan.blueprint.stages, plan.blueprint.layouts, hyper, types, adapters)
        on_device = plan.device.placement if plan.device else None
        shapes = Shapes(costs, hyper.hidden_size)
        return Placed(shapes, machine, plan.placement, on_device, plan.decode_threads, self._routing)

    def smallest_ram_bytes(self, context_tokens: int) -> int:
        """The least budget that `make` takes for this context."""
        blueprint = self._blueprint(False, NARROW_DRIVE, self._shares.first(context_tokens))
        return smallest_bytes(self._demand(blueprint, context_tokens, 0))

    def _plan_roomiest(self, limit: int, trained: int) -> Plan:
        """Halve a context that nobody asked for until the rest fits beside it. Raises OverBudget for the least one."""
        context, least = self._roomiest_context(limit, trained), min(LEAST_CONTEXT_TOKENS, trained)
        while context > least:
            if self.smallest_ram_bytes(context) <= limit:
                break
            context = max(context // 2, least)
        return self._plan_at(context, limit)

    def _roomiest_context(self, limit: int, trained: int) -> int:
        """The largest power of two whose keys and values take at most a quarter of the budget, or the least one."""
        blueprint = self._blueprint(False, NARROW_DRIVE, None)
        context = min(LEAST_CONTEXT_TOKENS, trained)
        while context * 2 <= trained and blueprint.kv_shape(context * 2).used_bytes(context * 2) * KV_SHARE <= limit:
            context *= 2
        return context

    def _plan_at(self, context_tokens: int, limit: int) -> Plan:
        return self._plan_with(self._shares.first(context_tokens), context_tokens, limit)

    def _plan_with(self, share: DeviceShare | None, context_tokens: int, limit: int) -> Plan:
        """Try the faster set-ups first; the last, the narrowest, is the one that names the smallest budget."""
        wide = self._drive.settings
        for all_resident, drive in ((True, wide), (False, wide), (True, NARROW_DRIVE)):
            blueprint = self._blueprint(all_resident, drive, share)
            if blueprint.bounce_bytes * WIDE_SHARE > limit and drive is wide:
                continue
            placement = self._try(blueprint, context_tokens, limit)
            if placement is not None and not (all_resident and placement.is_streaming):
                return self._plan_of(blueprint, placement, context_tokens, limit)
        blueprint = self._blueprint(False, NARROW_DRIVE, share)
        try:
            placement = place(self._demand(blueprint, context_tokens, limit))
        except OverBudget as error:
            raise self._with_context_hint(error, blueprint, context_tokens, limit) from None
        return self._plan_of(blueprint, placement, context_tokens, limit)

    def _with_context_hint(
        self, error: OverBudget, blueprint: Blueprint, context_tokens: int, limit: int
    ) -> OverBudget:
        """Say which context would fit, where a shorter one would, in whole pages of the KV cache."""

        def is_too_long(num_pages: int) -> bool:
            return smallest_bytes(self._demand(blueprint, num_pages * ROWS_PER_PAGE, 0)) > limit

        least = LEAST_CONTEXT_TOKENS // ROWS_PER_PAGE
        pages = range(least, -(-context_tokens // ROWS_PER_PAGE))
        num_fitting = bisect_left(pages, True, key=is_too_long)
        if not num_fitting:
            return error
        hint = f"-c {pages[num_fitting - 1] * ROWS_PER_PAGE} fits; {error.hint}"
        return OverBudget(error.message, smallest_bytes=error.smallest_bytes, hint=hint)

    def _try(self, blueprint: Blueprint, context_tokens: int, limit: int) -> Placement | None:
        try:
            return place(self._demand(blueprint, context_tokens, limit))
        except OverBudget:
            return None

    def _demand(self, blueprint: Blueprint, context_tokens: int, limit: int) -> Demand:
        return demand(blueprint, context_tokens, limit, self._process_bytes(), self.kept_bytes)

    @property
    def _drive(self) -> DriveRate:
        return self._host.drive_rate(self._model.manifest.files)

    def _blueprint(self, all_resident: bool, drive: DriveSettings, share: DeviceShare | None) -> Blueprint:
        there = share.tensors if share else frozenset()
        weights, config = self._weights.repacked(without=there), self.config
        layouts = choose_layouts(weights.stages, self._compute.repack, config.layout, all_resident, there)
        return Blueprint(weights.manifest, weights.stages, layouts, self._compute, config, drive, share, self._adapters)

    def _plan_of(self, blueprint: Blueprint, placement: Placement, context_tokens: int, limit: int) -> Plan:
        tensors = self._model.manifest.tensors
        repacked = {tensors[name].type.name for name in blueprint.layouts.repacked}
        weights = sum(spec.num_bytes for stage in self._model.stages for spec in stage.specs)
        return Plan(placement, context_tokens, limit, weights, tuple(sorted(repacked)), self._drive, blueprint)

    def _process_bytes(self) -> int:
        return self._host.process_bytes or process_bytes_now()


def _over(blueprint: Blueprint, weights: Weights, layouts: WeightLayouts) -> Blueprint:
    return replace(blueprint, manifest=weights.manifest, stages=weights.stages, layouts=layouts)


def _request_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.total_s


def _soonest(plans: Sequence[Plan]) -> list[Plan]:
    """As far as predictions can tell them apart; the soonest first."""
    bound_s = TOLERANCE * min(map(_request_s, plans))
    return sorted((plan for plan in plans if _request_s(plan) <= bound_s), key=_request_s)


def _copied_bytes(plan: Plan) -> int:
    """To the device in every pass: what need not be copied is not late."""
    return plan.device.placement.streamed_bytes if plan.device else 0


def _stall_share(plan: Plan) -> float:
    assert plan.prediction is not None
    return max(plan.prediction.decode.stall_share, NO_STALL)


def probe_kind(device: ComputeDevice | AbsentDevice | None, limit_bytes: int) -> str:
    """What tells a profile that was measured with this device and memory apart from others of the machine."""
    kind = f"; device {device.name} {device.info.description}" if isinstance(device, ComputeDevice) else ""
    return kind if limit_bytes == PROBE_BYTES else f"{kind}; in {limit_bytes // MIB // 32 * 32} MiB"


def _knows_device(machine: MachineProfile, plan: Plan) -> bool:
    """The profile has what computes beside the CPU."""
    if plan.device is None:
        return True
    return [device.name for device in machine.devices[1:2]] == [plan.device.device.name]
