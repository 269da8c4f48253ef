"""What this machine gives, measured through the code that will use it: a MachineProfile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from pipo.base.cores import available_cores
from pipo.base.errors import UsageError
from pipo.base.machine import ComputeProfile, LayoutRates, LinkProfile, MachineProfile, RepackProfile, SharedUse
from pipo.base.tensor_type import ROWS_PER_GROUP, TensorType
from pipo.base.units import MIB, PAGE_BYTES, round_down, round_up
from pipo.compute.device import ComputeDevice
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graphs import WeightType
from pipo.compute.repack import RepackBuffer
from pipo.hardware.compute_rates import (
    BlockShape,
    MatrixRate,
    measure_activations,
    measure_attention,
    measure_overheads,
    measure_products,
)
from pipo.hardware.contention import measure_shared_use
from pipo.hardware.device_meter import DeviceMeter
from pipo.hardware.drive import (
    PROBE_COMBOS,
    QUICK_COMBOS,
    best_rate,
    measure_drive,
    measure_read_latency,
    measure_repacked_reads,
)
from pipo.hardware.load import OtherLoad
from pipo.hardware.memory import machine_name, physical_memory_bytes
from pipo.hardware.meter import Meter, typical_s
from pipo.store.index import RepackRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.disk import DriveSettings

T = TensorType
COMMON_TYPES = (T.Q4_0, T.Q4_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K, T.F16, T.BF16)
# cycled over. One token of repacked Q4_0 on two cores, ps an element, by MiB: 10.9 at 64, 11.1 at 128, 11.4 at 256,
# 12.2 to 12.9 at 512, and 12.4 in a pass over 3.6 GiB; of 8 tokens 37 everywhere
WEIGHTS_BYTES = 256 * MIB
PROBE_BYTES = 288 * MIB  # what a probe takes at most: weights and activations, or before them the drive's two places
_COPY_BYTES = 16 * MIB
_NOISE_SHARE = 0.1  # of the cores, that other programs may take unmentioned


Progress = Callable[[str, float], None]  # what is being measured, and the fraction of the whole that is done


@dataclass(frozen=True, slots=True)
class Scope:
    """What to measure, and how long: the drive, then all else, which is shorter for few types, longer where it is slow.

    `limit_bytes` bounds the memory; less than PROBE_BYTES tries fewer ways of reading and cycles over fewer weights,
    which may then stay in a cache. `block` gives the sizes of the ops.
    """

    files: Sequence[Path]
    types: Sequence[TensorType] = COMMON_TYPES
    cache_types: Sequence[TensorType] = (T.F16,)
    limit_bytes: int = PROBE_BYTES
    drive_s: float = 3.5
    compute_s: float = 9.0
    block: BlockShape = field(default_factory=BlockShape)

    def __post_init__(self) -> None:
        assert self.files and self.types and self.cache_types
        if self.limit_bytes < self.least_bytes:
            raise UsageError(f"a probe needs {self.least_bytes} bytes of memory, {self.limit_bytes} are left for it")

    @property
    def least_bytes(self) -> int:
        """One matrix of the largest type, or the keys and values of one attention, besides what they work on."""
        block = self.block
        matrices = (block.hidden_size * type_.row_bytes(block.hidden_size) for type_ in self.types)
        cached = (2 * block.num_positions * type_.row_bytes(block.hidden_size) for type_ in self.cache_types)
        return block.activation_bytes + round_up(max(*matrices, *cached), PAGE_BYTES) + MIB

    @property
    def weights_bytes(self) -> int:
        return round_down(min(WEIGHTS_BYTES, self.limit_bytes - self.block.activation_bytes), PAGE_BYTES)

    @property
    def combos(self) -> Sequence[DriveSettings]:
        """The ways of reading whose two places fit; the narrowest always does."""
        fitting = [c for c in PROBE_COMBOS if 2 * c.chunk_bytes * c.num_workers + 4 * MIB <= self.limit_bytes]
        return fitting or PROBE_COMBOS[:1]


def probe(
    lib: Library,
    backend: CpuBackend,
    repack: RepackBuffer | None,
    scope: Scope,
    on_progress: Progress = lambda step, fraction: None,
    device: ComputeDevice | None = None,
) -> MachineProfile:
    """Measure the drive under `scope.files`, copies, repacking, and the backend: under 20 s with the default scope. A
    `device` beside the CPU takes as long as the CPU once more.

    Memory: `scope.limit_bytes`, given back before it returns. Cost: see Scope. Threads: computes on the calling
    thread, which must be the one that computes later (two OpenMP teams slow each other). What `on_progress` raises
    ends the probe. Raises TransferError, ComputeError, OverBudget.
    """
    profile = _Probe(lib, backend, repack, scope, on_progress).run()
    if device is None:
        return profile
    on_progress(f"device {device.name}", 1.0)
    return replace(profile, devices=(profile.cpu, measure_device(device, scope)))


def measure_device(device: ComputeDevice, scope: Scope) -> ComputeProfile:
    """What it computes and how fast bytes go there and back. Takes an eighth of its memory at most, given back before
    it returns. Raises OutOfDeviceMemory, ComputeError.
    """
    weights_bytes = min(scope.weights_bytes, device.free_bytes // 8)
    each_s = scope.compute_s / (len(scope.types) + 2)
    with DeviceMeter(device, weights_bytes, scope.block.activation_bytes) as meter:
        overheads = measure_overheads(meter, scope.types[0], 0.5 * each_s)
        up, down = meter.links(0.2 * each_s)
        rates = {t: measure_products(meter, WeightType(t), each_s, scope.block) for t in scope.types}
        return ComputeProfile(
            name=device.name,
            is_cpu=False,
            num_threads=1,
            memory_bytes=device.info.total_bytes,
            products={t.name: LayoutRates(rate.elements, plain_start=rate.start) for t, rate in rates.items()},
            attention={t.name: measure_attention(meter, t, 0.5 * each_s, scope.block) for t in scope.cache_types},
            activation_s_per_element=measure_activations(meter, 0.3 * each_s, scope.block),
            stage_overhead_s=overheads.stage_s,
            graph_start_s=overheads.graph_start_s,
            from_host=up,
            to_host=down,
        )


class _Probe:
    def __init__(
        self, lib: Library, backend: CpuBackend, repack: RepackBuffer | None, scope: Scope, on_progress: Progress
    ) -> None:
        self._lib = lib
        self._backend = backend
        self._repack = repack
        self._scope = scope
        self._on_progress = on_progress
        whole_s = scope.drive_s + scope.compute_s
        self._drive_share = scope.drive_s / whole_s
        self._layouts = list(self._find_layouts())

    def run(self) -> MachineProfile:
        scope, load = self._scope, OtherLoad()
        ways, drive, settings = self._measure_drive()
        reads = self._measure_repacked_reads(settings)
        with ExitStack() as resources:
            meter = self._meter(resources)
            device = self._measure_device(meter)
            shared_uses = self._measure_shared_use(meter, settings)
            return MachineProfile(
                name=machine_name(),
                source=_source(load.share()),
                libggml=f"{self._lib.version_text} of {self._lib.provider.name}",
                num_cores=available_cores(),
                ram_bytes=physical_memory_bytes(),
                drive=drive,
                drive_ways=ways,
                ram_copy=LinkProfile(_copy_rate(meter, 0.03 * scope.compute_s), chunk_bytes=_COPY_BYTES, depth=1),
                repack={t.name: self._repack_profile(meter, t, rate) for t, rate in reads.items()},
                devices=(device,),
                shared_uses=shared_uses,
            )

    def _find_layouts(self) -> Iterator[WeightType]:
        for type_ in self._scope.types:
            yield WeightType(type_)
            size = self._scope.block.hidden_size
            if self._repack is not None and self._repack.supports(type_, (size, size)):
                yield WeightType(type_, is_repacked=True)

    def _measure_drive(self) -> tuple[tuple[LinkProfile, ...], LinkProfile, DriveSettings]:
        scope = self._scope
        self._on_progress("drive", 0.0)
        rates = measure_drive(
            scope.files,
            combos=scope.combos,
            duration_s=0.75 * scope.drive_s,
            on_progress=lambda fraction: self._on_progress("drive", 0.75 * self._drive_share * fraction),
        )
        best = best_rate([rate for rate in rates if rate.settings in QUICK_COMBOS] or rates)  # as a first run would
        latency_s = measure_read_latency(scope.files, best.settings)
        ways = [LinkProfile(rate.bytes_per_s, latency_s, rate.chunk_bytes, rate.num_workers) for rate in rates]
        return tuple(ways), ways[rates.index(best)], best.settings

    def _measure_repacked_reads(self, settings: DriveSettings) -> Mapping[TensorType, float]:
        """The types that can be repacked, and the drive's rate meanwhile."""
        repacked = [layout.type for layout in self._layouts if layout.is_repacked]
        rates: dict[TensorType, float] = {}
        for i, type_ in enumerate(repacked):
            self._on_progress(f"reading {type_.name} repacked", self._drive_share * (0.75 + 0.25 * i / len(repacked)))
            each_s = 0.25 * self._scope.drive_s / len(repacked)
            row_elems = self._scope.block.hidden_size
            rate = measure_repacked_reads(self._scope.files, settings, self._repack_rows, type_, row_elems, each_s)
            if rate is not None:
                rates[type_] = rate
        return rates

    def _repack_rows(self, rows: RepackRows, num_rows: int, source: int, target: int) -> None:
        assert self._repack is not None
        self._repack.repack_rows(rows.type, rows.row_elems, num_rows, source, target)

    def _repack_profile(self, meter: Meter, type_: TensorType, read_bytes_per_s: float) -> RepackProfile:
        row_elems = self._scope.block.hidden_size
        num_rows = max(MIB // type_.row_bytes(row_elems) // ROWS_PER_GROUP, 1) * ROWS_PER_GROUP
        seconds = meter.repack_s(type_, row_elems, num_rows, 0.02 * self._scope.compute_s)
        return RepackProfile(num_rows * type_.row_bytes(row_elems) / seconds, read_bytes_per_s)

    def _meter(self, resources: ExitStack) -> Meter:
        ledger = Ledger(self._scope.limit_bytes)
        weights, activations = (
            resources.enter_context(Arena(num_bytes, name="probe", ledger=ledger)).take(num_bytes)
            for num_bytes in (self._scope.weights_bytes, self._scope.block.activation_bytes)
        )
        return Meter(self._lib, self._backend, self._repack, weights, activations)

    def _measure_device(self, meter: Meter) -> ComputeProfile:
        scope, budget_s = self._scope, self._scope.compute_s
        self._step("overheads", 0.0)
        overheads = measure_overheads(meter, scope.types[0], 0.06 * budget_s)
        activation_s = measure_activations(meter, 0.02 * budget_s, scope.block)
        attention = {}
        for i, type_ in enumerate(scope.cache_types):
            self._step(f"attention over {type_.name}", 0.05 + 0.1 * i / len(scope.cache_types))
            attention[type_.name] = measure_attention(
                meter, type_, 0.1 * budget_s / len(scope.cache_types), scope.block
            )
        return ComputeProfile(
            name="CPU",
            is_cpu=True,
            num_threads=self._backend.num_threads,
            memory_bytes=physical_memory_bytes(),
            products=self._measure_products(meter, min(0.8, 0.15 * len(self._layouts)) * budget_s),
            attention=attention,
            activation_s_per_element=activation_s,
            stage_overhead_s=overheads.stage_s,
            graph_start_s=overheads.graph_start_s,
        )

    def _measure_products(self, meter: Meter, duration_s: float) -> dict[str, LayoutRates]:
        """Each of them in two rounds, and the better counts: another program may take a core for a second."""
        each_s = duration_s / (2 * len(self._layouts))
        rates: dict[WeightType, MatrixRate] = {}
        for i, layout in enumerate(2 * self._layouts):
            kind = "repacked" if layout.is_repacked else "plain"
            self._step(f"{layout.type.name} {kind}", 0.15 + 0.8 * i / (2 * len(self._layouts)))
            rate = measure_products(meter, layout, each_s, self._scope.block)
            rates[layout] = rates[layout].best_of(rate) if layout in rates else rate
        return {type_.name: _layout_rates(type_, rates) for type_ in self._scope.types}

    def _measure_shared_use(self, meter: Meter, settings: DriveSettings) -> tuple[SharedUse, ...]:
        """Half of the weights' place is read into: last, since what lies there has no meaning afterwards."""
        self._step("both at once", 0.95)
        half = round_down(meter.weights.num_bytes // 2, PAGE_BYTES)
        weights, spare = (
            Place(meter.weights.view[start : start + half], meter.weights.address + start, half) for start in (0, half)
        )
        beside = Meter(self._lib, self._backend, self._repack, weights, meter.activations)
        layout, duration_s = WeightType(self._scope.types[0]), 0.2 * self._scope.compute_s
        files, block = self._scope.files, self._scope.block
        return measure_shared_use(beside, self._backend, spare, files, settings, layout, duration_s, block)

    def _step(self, what: str, fraction: float) -> None:
        self._on_progress(what, self._drive_share + (1 - self._drive_share) * fraction)


def _layout_rates(type_: TensorType, rates: Mapping[WeightType, MatrixRate]) -> LayoutRates:
    plain, repacked = rates[WeightType(type_)], rates.get(WeightType(type_, is_repacked=True))
    if repacked is None:
        return LayoutRates(plain.elements, plain_start=plain.start)
    return LayoutRates(plain.elements, repacked.elements, plain.start, repacked.start)


def _source(others_share: float) -> str:
    """When, and whether other programs were in the way: then everything is faster than the figures say."""
    when = f"measured {date.today().isoformat()}"
    return when if others_share < _NOISE_SHARE else f"{when} while other programs took {others_share:.0%} of the cores"


def _copy_rate(meter: Meter, duration_s: float) -> float:
    """Bytes a second that one thread copies within RAM: what it reads, written as often."""
    num_bytes = min(_COPY_BYTES, meter.weights.num_bytes // 2)
    num_pieces = meter.weights.num_bytes // 2 // num_bytes
    half = meter.weights.num_bytes // 2

    def run(i: int) -> None:
        source = meter.weights.address + i % num_pieces * num_bytes
        ctypes.memmove(source + half, source, num_bytes)

    return num_bytes / typical_s(run, duration_s)
