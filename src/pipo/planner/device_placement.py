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
    """`fixed` is what the device needs whatever computes there, `kv_bytes` what the keys and values of a block take
    there, by the number of sequences that have theirs there at a time: all of them at most.
    """

    units: Sequence[DeviceUnit]
    fixed: Mapping[str, int]
    kv_bytes: Mapping[int, int]
    limit_bytes: int

    @property
    def num_sequences(self) -> int:
        return max(self.kv_bytes)

    @property
    def blocks(self) -> list[int]:
        return sorted({unit.block_idx for unit in self.units if unit.block_idx >= 0})


@dataclass(frozen=True, slots=True)
class DevicePlacement:
    """By unit: whether its stage computes on the device, and whether it stays there or passes through a slot of its
    class. `kv_sequences`: keys and values of the device's blocks live in RAM, and move to the device for so many
    sequences at a time; 0: they stay there.
    """

    computes: tuple[bool, ...]
    resident: tuple[bool, ...]
    slot_class: tuple[int, ...]
    slots: tuple[SlotClass, ...]
    kv_sequences: int
    resident_bytes: int
    streamed_bytes: int  # copied per pass
    kv_bytes: int
    fixed: Mapping[str, int] = field(default_factory=dict)

    @property
    def moves_kv(self) -> bool:
        return self.kv_sequences > 0

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
        _placement(demand, streamed, resident, kv_sequences).num_bytes
        for streamed, resident in shapes
        for kv_sequences in (0, *demand.kv_bytes)
    )


def place_on_device(demand: DeviceDemand) -> Iterator[DevicePlacement]:
    """Every placement worth a look, for each number of streamed blocks: as many others stay as fit, and the rest is
    the CPU's. The first streams nothing. None where not even the head and one block fit.

    Keys and values that move do so for all sequences at once, and for fewer where more blocks fit then.
    """
    for num_streamed in range(len(demand.blocks) + 1):
        staying = _best(demand, num_streamed, 0)
        if staying is not None:
            yield staying
        fewest = 0  # units that compute there
        for kv_sequences in sorted(demand.kv_bytes, reverse=True):
            moving = _best(demand, num_streamed, kv_sequences)
            if moving is not None and sum(moving.computes) > fewest:
                yield moving
                fewest = sum(moving.computes)
                if moving.is_all:
                    break


def _best(demand: DeviceDemand, num_streamed: int, kv_sequences: int) -> DevicePlacement | None:
    most = len(demand.blocks) - num_streamed

    def attempt(num_on_cpu: int) -> DevicePlacement | None:
        placement = _placement(demand, num_streamed, most - num_on_cpu, kv_sequences)
        return placement if placement.num_bytes <= demand.limit_bytes else None

    return first_fitting(attempt, most + 1 if num_streamed else most)


def _placement(demand: DeviceDemand, num_streamed: int, num_resident: int, kv_sequences: int) -> DevicePlacement:
    ours = demand.blocks[len(demand.blocks) - num_streamed - num_resident :]
    passing = {ours[i] for i in spread(range(len(ours)), num_streamed)}
    computes = tuple(unit.block_idx in ours or unit.block_idx < 0 for unit in demand.units)
    resident = tuple(c and unit.block_idx not in passing for unit, c in zip(demand.units, computes, strict=True))
    streamed = [unit for unit in demand.units if unit.block_idx in passing]
    num_kv = num_kv_slots(len(ours), demand.num_sequences, kv_sequences) if kv_sequences else len(ours)
    return DevicePlacement(
        computes=computes,
        resident=resident,
        slot_class=tuple(0 if unit.role is UnitRole.ATTENTION else 1 for unit in demand.units),
        slots=tuple(
            _class_of(unit.num_bytes for unit in streamed if (unit.role is UnitRole.ATTENTION) is is_attention)
            for is_attention in (True, False)
        ),
        kv_sequences=kv_sequences,
        resident_bytes=sum(unit.num_bytes for unit, stays in zip(demand.units, resident, strict=True) if stays),
        streamed_bytes=sum(unit.num_bytes for unit in streamed),
        kv_bytes=num_kv * demand.kv_bytes[kv_sequences or demand.num_sequences],
        fixed=demand.fixed,
    )


def num_kv_slots(num_blocks: int, num_sequences: int, kv_sequences: int) -> int:
    """For keys and values that move to the device, of so many sequences at a time."""
    return min(SLOTS_PER_CLASS, num_blocks * -(-num_sequences // kv_sequences))


def _class_of(sizes: Iterable[int]) -> SlotClass:
    moving = list(sizes)
    return SlotClass(max(moving, default=0), min(SLOTS_PER_CLASS, len(moving)))
