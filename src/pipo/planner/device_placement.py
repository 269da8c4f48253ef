"""Who computes and lives on a device: pure arithmetic from sizes and a limit.

The first blocks compute on the CPU, the last ones, with the head, on the device: the hidden state crosses once. Of
the device's blocks some stay there and the others pass through slots, spread evenly between them so that copies
overlap with blocks that need none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipo.planner.fitting import first_fitting, spread
from pipo.planner.placement import SlotClass, UnitRole

SLOTS_PER_CLASS = 2  # one is filled while the other computes


@dataclass(frozen=True, slots=True)
class DeviceUnit:
    """A unit as it would lie on the device."""

    role: UnitRole
    block_idx: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceDemand:
    """`fixed` is what the device needs whatever computes there, `kv_block_bytes` what the keys and values of a block
    take there for good.
    """

    units: Sequence[DeviceUnit]
    fixed: Mapping[str, int]
    kv_block_bytes: int
    limit_bytes: int

    @property
    def blocks(self) -> list[int]:
        return sorted({unit.block_idx for unit in self.units if unit.block_idx >= 0})


@dataclass(frozen=True, slots=True)
class DevicePlacement:
    """By unit: whether its stage computes on the device, and whether it stays there or passes through a slot of its
    class. `moves_kv`: keys and values of the device's blocks live in RAM.
    """

    computes: tuple[bool, ...]
    resident: tuple[bool, ...]
    slot_class: tuple[int, ...]
    slots: tuple[SlotClass, ...]
    moves_kv: bool
    resident_bytes: int
    streamed_bytes: int  # copied per pass
    kv_bytes: int
    fixed: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_all(self) -> bool:
        """Nothing is left to the CPU."""
        return all(self.computes)

    @property
    def breakdown(self) -> dict[str, int]:
        slots = sum(each.num_bytes for each in self.slots)
        return {"resident weights": self.resident_bytes, "slots": slots, "KV cache": self.kv_bytes, **self.fixed}

    @property
    def num_bytes(self) -> int:
        return sum(self.breakdown.values())


def smallest_vram_bytes(demand: DeviceDemand) -> int:
    """The least limit that `place_on_device` finds a placement for."""
    shapes = ((1, 0), (0, 1))  # one block that passes through or stays
    return min(
        _placement(demand, streamed, resident, moves_kv).num_bytes
        for streamed, resident in shapes
        for moves_kv in (False, True)
    )


def place_on_device(demand: DeviceDemand) -> Iterator[DevicePlacement]:
    """Every placement worth a look, for each number of streamed blocks: as many others stay as fit, and the rest is
    the CPU's. The first streams nothing. None where not even the head and one block fit.
    """
    num_blocks = len(demand.blocks)
    for num_streamed in range(num_blocks + 1):
        for moves_kv in (False, True):
            most = num_blocks - num_streamed

            def staying(
                num_on_cpu: int, num_streamed: int = num_streamed, most: int = most, moves_kv: bool = moves_kv
            ) -> DevicePlacement | None:
                placement = _placement(demand, num_streamed, most - num_on_cpu, moves_kv)
                return placement if placement.num_bytes <= demand.limit_bytes else None

            best = first_fitting(staying, most + 1 if num_streamed else most)
            if best is not None:
                yield best


def _placement(demand: DeviceDemand, num_streamed: int, num_resident: int, moves_kv: bool) -> DevicePlacement:
    ours = demand.blocks[len(demand.blocks) - num_streamed - num_resident :]
    passing = {ours[i] for i in spread(range(len(ours)), num_streamed)}
    computes = tuple(unit.block_idx in ours or unit.block_idx < 0 for unit in demand.units)
    resident = tuple(c and unit.block_idx not in passing for unit, c in zip(demand.units, computes, strict=True))
    streamed = [unit for unit in demand.units if unit.block_idx in passing]
    kv_blocks = min(SLOTS_PER_CLASS, len(ours)) if moves_kv else len(ours)
    return DevicePlacement(
        computes=computes,
        resident=resident,
        slot_class=tuple(0 if unit.role is UnitRole.ATTENTION else 1 for unit in demand.units),
        slots=tuple(
            _class_of(unit.num_bytes for unit in streamed if (unit.role is UnitRole.ATTENTION) is is_attention)
            for is_attention in (True, False)
        ),
        moves_kv=moves_kv,
        resident_bytes=sum(unit.num_bytes for unit, stays in zip(demand.units, resident, strict=True) if stays),
        streamed_bytes=sum(unit.num_bytes for unit in streamed),
        kv_bytes=kv_blocks * demand.kv_block_bytes,
        fixed=demand.fixed,
    )


def _class_of(sizes: Iterable[int]) -> SlotClass:
    moving = list(sizes)
    return SlotClass(max(moving, default=0), min(SLOTS_PER_CLASS, len(moving)))
