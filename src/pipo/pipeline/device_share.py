"""What of a model would lie and compute on a device, before any memory is taken there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from pipo.base.adapter import ADAPTERS, Adapter
from pipo.base.manifest import HyperParameters
from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice
from pipo.compute.device_backend import DeviceBackend
from pipo.kvcache.cache import KvShape
from pipo.models.stage import ShapeClass, Stage, StageKind
from pipo.pipeline.buffers import ATTENTION_INPUTS, STAGE_ARRAYS, BufferShape
from pipo.pipeline.device_adapters import device_adapter_bytes
from pipo.pipeline.device_layout import AbsentDevice, DeviceSizes, unit_on_device, vectors_on_device
from pipo.pipeline.stage_graphs import Compute, StageGraphs
from pipo.pipeline.units import ROLES, WeightLayouts
from pipo.planner.device_placement import DeviceDemand, DevicePlacement, DeviceUnit

PLAIN = WeightLayouts(frozenset())  # repacked kernels are the CPU's


@dataclass(frozen=True, slots=True)
class PassSizes:
    """Of the largest pass: its graphs, its arrays, and the cache of all blocks."""

    shapes: Sequence[ShapeClass]
    buffers: BufferShape
    kv: KvShape


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A placement on a device. `stages` has the head in one piece."""

    device: ComputeDevice | AbsentDevice
    placement: DevicePlacement
    stages: Sequence[Stage]
    limit_bytes: int
    chunk_tokens: int  # most that a pass may have there

    @property
    def blocks(self) -> frozenset[int]:
        """That compute there."""
        units = [stage for stage in self.stages if stage.matrices]
        return frozenset(
            stage.block_idx
            for stage, computes in zip(units, self.placement.computes, strict=True)
            if computes and stage.block_idx >= 0
        )

    @property
    def kv_blocks(self) -> frozenset[int]:
        """Whose keys and values stay there."""
        return frozenset() if self.placement.moves_kv else self.blocks

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the matrices that compute there."""
        return frozenset(spec.name for stage in self.stages if self.is_here(stage) for spec in stage.matrices.values())

    def is_here(self, stage: Stage) -> bool:
        """Norm and head, like the blocks' stages, compute where their weights are; the head always here, routed
        experts never.
        """
        if stage.kind is StageKind.EXPERTS:
            return False
        return stage.block_idx in self.blocks or stage.kind in (StageKind.FINAL_NORM, StageKind.HEAD)


def device_demand(
    stages: Sequence[Stage],
    hyper: HyperParameters,
    device: ComputeDevice | AbsentDevice,
    cpu: Compute,
    sizes: PassSizes,
    limit_bytes: int,
    adapters: Sequence[Adapter] = (),
) -> DeviceDemand:
    """What each unit, and the largest pass, would take there.

    On a device that is not here the intermediates are taken to be as large as the CPU's: the graphs are the same, and
    what a driver takes for itself is known to neither.
    """
    stages = [stage for stage in stages if stage.kind is not StageKind.EXPERTS]
    if isinstance(device, AbsentDevice):
        with closing(StageGraphs(cpu, hyper, PLAIN)) as graphs:
            workspace = graphs.measure(stages, sizes.shapes, adapters)
            return _demand_of(stages, device, workspace, sizes, limit_bytes, adapters)
    with DeviceBackend(device) as backend, closing(StageGraphs(Compute(device.lib, backend), hyper, PLAIN)) as graphs:
        workspace = graphs.measure(stages, sizes.shapes, adapters)
        return _demand_of(stages, device, workspace, sizes, limit_bytes, adapters)


def _demand_of(
    stages: Sequence[Stage],
    device: DeviceSizes,
    workspace: int,
    sizes: PassSizes,
    limit_bytes: int,
    adapters: Sequence[Adapter],
) -> DeviceDemand:
    fixed = {
        "activations": workspace + sum(array_bytes(sizes.buffers, device).values()),
        "norms": vectors_on_device(stages, device).num_bytes,
    }
    if adapters:
        fixed[ADAPTERS] = device_adapter_bytes(adapters, stages, device, sizes.buffers)
    units = [
        DeviceUnit(ROLES[stage.kind], stage.block_idx, unit_on_device(stage, device).num_bytes)
        for stage in stages
        if stage.matrices
    ]
    return DeviceDemand(units, fixed, kv_bytes(sizes, device), limit_bytes)


def array_bytes(buffers: BufferShape, device: DeviceSizes) -> dict[str, int]:
    """Of the arrays that stages which compute there read and write. Those of each micro-batch begin where they may: of
    as many as there are sequences at most.
    """
    gaps = buffers.num_sequences * device.alignment if buffers.num_sequences > 1 else 0
    return {
        name: round_up(size + (gaps if name in ATTENTION_INPUTS else 0), device.alignment)
        for name, size in buffers.sizes.items()
        if name in STAGE_ARRAYS
    }


def kv_sizes(kv: KvShape, device: DeviceSizes) -> list[int]:
    """Of the keys and the values of one block."""
    return [round_up(size, device.alignment) for size in (kv.layer_bytes_k, kv.layer_bytes_v)]


def kv_bytes(sizes: PassSizes, device: DeviceSizes) -> dict[int, int]:
    """Of one block, by the number of sequences: all, and half of them, a quarter, … where a micro-batch of a pass may
    begin with any of its tokens.
    """
    counts = [sizes.kv.num_sequences]
    if not any(num_bytes % device.alignment for num_bytes in sizes.buffers.row_bytes.values()):
        while counts[-1] > 1:
            counts.append(-(-counts[-1] // 2))
    return {num: sum(kv_sizes(replace(sizes.kv, num_sequences=num), device)) for num in counts}
