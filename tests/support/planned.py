"""Models of which only the planner's arithmetic is needed: blocks of two stages and a head, with round figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipo.base.machine import MachineProfile, StageWork, WeightWork
from pipo.base.tensor_type import TensorType
from pipo.planner.cost import StageCost
from pipo.planner.device_placement import DeviceDemand, DevicePlacement, DeviceUnit, place_on_device
from pipo.planner.placement import ChunkCost, Demand, Placement, UnitRole, UnitSize, place
from pipo.planner.predict import Placed, Shapes
from pipo.planner.residency import UnitId
from tests.support.machines import GPU, MACHINE

MIB = 1 << 20
HIDDEN_SIZE = 1024
WITH_GPU = replace(MACHINE, devices=(*MACHINE.devices, GPU))
ROLES = (UnitRole.ATTENTION, UnitRole.MLP)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the units of every block, and of the head."""

    num_blocks: int = 8
    attention: int = 8 * MIB
    mlp: int = 24 * MIB
    head: int = 16 * MIB
    kv_per_position: int = 4096

    @property
    def units(self) -> list[tuple[UnitRole, int, int]]:
        """(role, block, bytes), in order."""
        own = (self.attention, self.mlp)
        blocks = [(role, i, size) for i in range(self.num_blocks) for role, size in zip(ROLES, own, strict=True)]
        return [*blocks, (UnitRole.HEAD, -1, self.head)]


def shapes(sizes: Sizes) -> Shapes:
    """A final norm, which has no unit, stands before the head."""
    stages: list[StageCost] = []
    for i, (role, _, size) in enumerate(sizes.units):
        if role is UnitRole.HEAD:
            stages.append(StageCost(StageWork((), HIDDEN_SIZE), None))
        attends = role is UnitRole.ATTENTION
        cached = ((TensorType.F16, HIDDEN_SIZE),) * 2 if attends else ()
        work = StageWork((WeightWork(TensorType.Q4_0, size * 2),), 4 * HIDDEN_SIZE, cached)
        kv = sizes.kv_per_position if attends else 0
        stages.append(StageCost(work, UnitId(i), size, kv_bytes_per_position=kv))
    return Shapes(stages, HIDDEN_SIZE)


def ram_demand(sizes: Sizes, limit_bytes: int, staged: Sequence[bool] = (), in_flight_bytes: int = 0) -> Demand:
    units = [
        UnitSize(role, block, size, size, is_staged=bool(staged) and staged[i])
        for i, (role, block, size) in enumerate(sizes.units)
    ]
    return Demand(
        units, {"process": 10 * MIB}, [ChunkCost(16, MIB), ChunkCost(128, 4 * MIB)], limit_bytes, in_flight_bytes
    )


def device_demand(sizes: Sizes, limit_bytes: int, context_tokens: int = 512, num_sequences: int = 1) -> DeviceDemand:
    """Keys and values move for any number of the sequences at a time."""
    units = [DeviceUnit(role, block, size) for role, block, size in sizes.units]
    kv_bytes = {num: sizes.kv_per_position * context_tokens * num for num in range(1, num_sequences + 1)}
    return DeviceDemand(units, {"activations": MIB}, kv_bytes, limit_bytes)


def placed(
    sizes: Sizes, ram_bytes: int, device: DevicePlacement | None = None, machine: MachineProfile = WITH_GPU
) -> Placed:
    return Placed(shapes(sizes), machine, ram_placement(sizes, ram_bytes, device), device)


def ram_placement(sizes: Sizes, ram_bytes: int, device: DevicePlacement | None = None) -> Placement:
    return place(ram_demand(sizes, ram_bytes, device.resident if device else ()))


def all_on_device(sizes: Sizes, *, num_streamed: int = 0, moves_kv: bool = False) -> DevicePlacement:
    """Nothing is left to the CPU; so many blocks pass through slots."""
    found = place_on_device(device_demand(sizes, 1 << 40))
    streamed = sum(size for _, block, size in sizes.units if block == 0) * num_streamed
    return next(p for p in found if p.is_all and p.streamed_bytes == streamed and p.moves_kv is moves_kv)
