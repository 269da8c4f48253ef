"""Plans that are predicted, not run: for this machine or another, for a faster part, for many sequences at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType

from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, UsageError
from pipo.base.machine import MachineProfile
from pipo.base.units import format_size
from pipo.compute import ggml
from pipo.compute.device import ComputeDevice, choose_device
from pipo.hardware.budget import part_of
from pipo.hardware.cache import kept_profile
from pipo.hardware.drive import DriveRate
from pipo.hardware.host import GivenHost, ThisHost, rate_of_profile
from pipo.hardware.probe import PROBE_BYTES, Progress
from pipo.model_file import PROCESS_BYTES, ModelFile, process_bytes_now
from pipo.native import NativeWeights
from pipo.pipeline.device_layout import AbsentDevice
from pipo.pipeline.stage_graphs import compute_on_cpu
from pipo.plan import Plan, PlanMaker, probe_kind
from pipo.planner.batch import BatchCurve, BatchPoint, batch_point
from pipo.planner.experts import ExpectedRouting
from pipo.planner.predict import Workload, decode_load
from pipo.planner.variations import with_compute, with_drive, with_link
from pipo.type_checks import check_types, open_adapters

MORE_MEMORY, FASTER = 1.5, 2.0  # what "what would help most" tries
MAX_SEQUENCES = 4096  # at which the adviser stops looking


@dataclass(frozen=True, slots=True)
class Case:
    """What a plan is made for. `device` computes beside the CPU, where there is one."""

    machine: MachineProfile
    drive: DriveRate
    device: ComputeDevice | AbsentDevice | None
    ram_bytes: int
    vram_bytes: int
    workload: Workload
    context_tokens: int  # of each sequence
    process_bytes: int  # before it has any of the model


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that could be different, and what it would make of decode. `gain` 0.5 is half as fast again."""

    what: str
    tokens_per_s: float
    gain: float


class Outlook:
    """Plans one model under circumstances that need not be there. A context manager. Threads: one.

    Needs the model's header alone. Raises LibraryError, and UnsupportedModel for types that libggml does not compute.
    """

    def __init__(self, model: ModelFile, config: EngineConfig, routing: ExpectedRouting | None = None) -> None:
        """`routing` is what is known of a mixture's; without, what is assumed."""
        self._model = model
        self._config = config
        self._routing = routing
        self._lib = ggml.load()
        check_types(self._lib, model)
        self._adapters = open_adapters(self._lib, model, config)
        self._compute, _ = compute_on_cpu(self._lib, config.num_threads)
        self._weights = NativeWeights(model, self._compute.repack, config.layout)
        self._plain_weights = NativeWeights(model, None, "plain")

    def case_here(self, workload: Workload, context_tokens: int, on_probe: Progress) -> Case:
        """This machine and its limits, as a run would meet them. Measured now where no earlier figures serve, which
        takes some seconds. Raises UsageError where neither is possible.
        """
        host = ThisHost(self._config)
        device = choose_device(self._lib, self._config.device)
        process_bytes = process_bytes_now()  # before a probe: what a driver keeps of it is not a run's
        machine, drive = self._figures_here(host, device, on_probe)
        vram = host.vram_bytes(device.free_bytes) if device else 0
        return Case(machine, drive, device, host.ram_bytes(), vram, workload, context_tokens, process_bytes)

    def _figures_here(
        self, host: ThisHost, device: ComputeDevice | None, on_probe: Progress
    ) -> tuple[MachineProfile, DriveRate]:
        files = self._model.manifest.files
        if self._model.has_weights:
            maker = PlanMaker(self._model, self._config, self._compute, device, host, weights=self._weights)
            machine = maker.machine(on_probe)
            if machine is not None:
                return machine, host.drive_rate(files)
        kept = kept_profile(files, self._lib, self._config.num_threads, kind=probe_kind(device, PROBE_BYTES))
        if kept is None:
            raise UsageError(
                f"{files[0]}: has no weights, or too few, to measure the drive with",
                hint="`pipo doctor --probe` with a model on that drive, or --machine NAME for another machine",
            )
        return kept, rate_of_profile(kept.drive)

    def case_elsewhere(
        self, machine: MachineProfile, ram: str | None, vram: str | None, workload: Workload, context_tokens: int
    ) -> Case:
        """Another machine; `ram` and `vram` are all it has where they are None. Raises UsageError."""
        device = self._device_of(machine)
        there = device.free_bytes if device else 0
        limits = part_of(ram, machine.ram_bytes, what="--ram"), part_of(vram, there, what="--vram")
        return Case(machine, rate_of_profile(machine.drive), device, *limits, workload, context_tokens, PROCESS_BYTES)

    def _device_of(self, machine: MachineProfile) -> AbsentDevice | None:
        wanted = self._config.device
        there = machine.devices[1] if len(machine.devices) > 1 else None
        if wanted.lower() == "cpu" or (wanted == "auto" and there is None):
            return None
        if there is None or wanted not in ("auto", there.name):
            known = f"it has {there.name}" if there else "it has none besides the CPU"
            raise UsageError(
                f"--device {wanted!r:.80} is not of this machine: {known}", hint="auto takes what there is"
            )
        return AbsentDevice(there.name, there.memory_bytes)

    def plan(self, case: Case) -> Plan:
        """Raises OverBudget naming the smallest limit that works."""
        return self._maker(case).make(case.context_tokens, case.workload, case.machine)

    def _maker(self, case: Case) -> PlanMaker:
        config = replace(self._config, num_sequences=case.workload.num_sequences)
        host = GivenHost(case.ram_bytes, case.vram_bytes, case.drive, case.process_bytes)
        has_repacked = any(rates.repacked for rates in case.machine.cpu.products.values())
        # kernels that the machine was not measured with are taken not to be there
        compute = self._compute if has_repacked else replace(self._compute, repack=None)
        weights = self._weights if has_repacked else self._plain_weights
        return PlanMaker(self._model, config, compute, case.device, host, self._routing, self._adapters, weights)

    def what_would_help(self, case: Case, plan: Plan) -> list[Change]:
        """Other circumstances, one at a time, those that gain most first. Those that do not fit are left out."""
        assert plan.prediction is not None
        now, found = plan.prediction.tokens_per_s, []
        for what, other in _others(case):
            with suppress(OverBudget):
                prediction = self.plan(other).prediction
                if prediction is not None:
                    found.append(Change(what, prediction.tokens_per_s, prediction.tokens_per_s / now - 1))
        return sorted(found, key=lambda change: -change.gain)

    def batch_curve(self, case: Case, most: int = MAX_SEQUENCES) -> BatchCurve:
        """1, 2, 4, … `most` sequences, as far as their keys and values fit. Raises OverBudget where not one does."""
        points = [self._point(case, 1)]
        with suppress(OverBudget):
            while (num := 2 * points[-1].num_sequences) <= most:
                points.append(self._point(case, num))
        return BatchCurve(points)

    def _point(self, case: Case, num_sequences: int) -> BatchPoint:
        case = replace(case, workload=replace(case.workload, num_sequences=num_sequences))
        maker, plan = self._maker(case), self.plan(case)
        assert plan.prediction is not None
        return batch_point(maker.placed(plan, case.machine), plan.prediction, decode_load(case.workload))

    def close(self) -> None:
        self._compute.close()

    def __enter__(self) -> Outlook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _others(case: Case) -> Iterator[tuple[str, Case]]:
    machine, workload = case.machine, case.workload
    ram = int(case.ram_bytes * MORE_MEMORY)
    yield _instead(ram, case.ram_bytes, "RAM"), replace(case, ram_bytes=ram)
    drive = replace(case.drive, bytes_per_s=case.drive.bytes_per_s * FASTER)
    yield "a drive twice as fast", replace(case, machine=with_drive(machine, FASTER), drive=drive)
    yield "a CPU twice as fast", replace(case, machine=with_compute(machine, 0, FASTER))
    if case.device is not None and len(machine.devices) > 1:
        name, vram = case.device.name, int(case.vram_bytes * MORE_MEMORY)
        yield _instead(vram, case.vram_bytes, "device memory"), replace(case, vram_bytes=vram)
        yield f"a {name} twice as fast", replace(case, machine=with_compute(machine, 1, FASTER))
        yield f"a link to the {name} twice as fast", replace(case, machine=with_link(machine, FASTER))
    more = 2 * workload.num_sequences
    batch = replace(case, workload=replace(workload, num_sequences=more))
    yield f"{more} sequences at a time instead of {workload.num_sequences}", batch


def _instead(more: int, now: int, of: str) -> str:
    return f"{format_size(more)} of {of} instead of {format_size(now)}"
