"""The device's share of a running engine: its memory, and what is copied there and back in a pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from pipo.base.clock import Clock
from pipo.base.trace import Tracer
from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice, DevicePlace
from pipo.compute.graph import Binding, Graph
from pipo.kvcache.cache import KvCache, KvShape
from pipo.pipeline.buffers import PassBuffers
from pipo.pipeline.device_layout import DeviceLayout
from pipo.pipeline.executor import Places
from pipo.pipeline.spans import PassRows
from pipo.pipeline.units import Unit
from pipo.planner.residency import SlotId, UnitId
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Place
from pipo.transfer.device import Copy, DeviceTransfer, Direction
from pipo.transfer.handle import Handle


class DeviceArena:
    """Memory of a device, charged to its ledger and given back as one. Raises OverBudget, OutOfDeviceMemory."""

    def __init__(self, device: ComputeDevice, ledger: Ledger) -> None:
        self.device = device
        self._ledger = ledger
        self._exit = ExitStack()

    def take(self, name: str, sizes: Sequence[int]) -> list[DevicePlace]:
        """Places of these sizes, in as few buffers as the device allows."""
        places: list[DevicePlace] = []
        for group in _groups([round_up(size, self.device.alignment) for size in sizes], self.device.max_buffer_bytes):
            self._exit.enter_context(self._ledger.reserve(name, sum(group)))
            buffer = self._exit.enter_context(self.device.allocate(sum(group)))
            buffer.clear()  # rows of keys and values that no token has written are masked, and must be finite
            places += [buffer.place(sum(group[:i])) for i in range(len(group))]
        return places

    def keep(self, close: Callable[[], None]) -> None:
        """Close something of others with this memory."""
        self._exit.callback(close)

    def close(self) -> None:
        self._exit.close()


def _groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """In order, each group's sum at most `most` where its first size allows that."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= most:
            groups[-1].append(size)
        elif size:
            groups.append([size])
    return groups


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Where the leaves of the device's graphs lie. `kv` gives the places of a block's keys and values, which begin with
    those of `first_sequence`. What has rows of the pass begins at its place plus its offset, by name or key.
    """

    vectors: Mapping[str, DevicePlace]
    layouts: Mapping[UnitId, DeviceLayout]
    arrays: Mapping[str, DevicePlace]
    kv: Mapping[int, tuple[DevicePlace, DevicePlace]]
    kv_shape: KvShape
    adapters: Mapping[str, DevicePlace]  # by key; those of stages that compute here, and scales
    alignment: int
    offsets: Mapping[str, int] = field(default_factory=dict)
    first_sequence: int = 0

    def vector(self, name: str) -> DevicePlace:
        return self.vectors[name]

    def matrix(self, unit: Unit, name: str, place: Place | DevicePlace) -> DevicePlace:
        assert isinstance(place, DevicePlace)
        return _beyond(place, self.layouts[unit.unit_id].offsets[name])

    @property
    def stage_arrays(self) -> Collection[str]:
        return self.arrays.keys() - {"logits"}

    def array(self, name: str) -> DevicePlace:
        return _beyond(self.arrays[name], self.offsets.get(name, 0))

    def adapter(self, key: str) -> DevicePlace:
        return _beyond(self.adapters[key], self.offsets.get(key, 0))

    def logits(self, first_row: int, num_outputs: int) -> DevicePlace:
        return _beyond(self.arrays["logits"], PassBuffers.logits_offset(first_row, num_outputs))

    def keys_and_values(self, block_idx: int, sequence: int) -> tuple[DevicePlace, DevicePlace]:
        keys, values = self.kv[block_idx]
        shape, sequence = self.kv_shape, sequence - self.first_sequence
        return _beyond(keys, sequence * shape.sequence_bytes_k), _beyond(values, sequence * shape.sequence_bytes_v)

    def bind(self, graph: Graph, leaves: Mapping[str, DevicePlace]) -> Binding:
        return graph.device_binding(leaves)


class MovingKv:
    """Keys and values that live in RAM, and pass through slots on the device while their stage computes: those of one
    micro-batch of sequences in one block at a time, in turn.

    `block_of_stage` are the attention stages that compute there, in order.
    """

    def __init__(
        self,
        shape: KvShape,
        cache: KvCache,
        slots: Sequence[tuple[DevicePlace, DevicePlace]],
        block_of_stage: Mapping[int, int],
    ) -> None:
        self.block_of_stage = block_of_stage
        self._shape = shape
        self._cache = cache
        self._turn_of_stage = {stage: i for i, stage in enumerate(block_of_stage)}
        self._slots = slots
        self._parts: Sequence[PassRows] = ()
        self._saved: dict[int, Handle] = {}  # by slot: the newest save from it
        self._newest: Handle | None = None  # of all saves

    def begin_pass(self, parts: Sequence[PassRows]) -> None:
        """Of which each is a micro-batch: positions before its starts are loaded, those after them saved. Those of a
        sequence may have been in another slot in the last pass: saves end in order, so the newest tells of all.
        """
        self._parts = parts
        if self._newest is not None:
            self._saved = dict.fromkeys(range(len(self._slots)), self._newest)

    def places(self, micro_batch: int) -> dict[int, tuple[DevicePlace, DevicePlace]]:
        """Of its keys and values, by block."""
        return {block: self._slots[self._slot(stage, micro_batch)] for stage, block in self.block_of_stage.items()}

    def load(self, stage_idx: int, micro_batch: int, up: DeviceTransfer) -> Handle:
        saved = self._saved.get(self._slot(stage_idx, micro_batch))
        ranges = [(span.sequence, 0, span.start) for span in self._parts[micro_batch].spans]
        return up.submit(self._copies(stage_idx, micro_batch, ranges), "keys and values", [saved] if saved else [])

    def save(self, stage_idx: int, micro_batch: int, down: DeviceTransfer) -> Handle:
        ranges = [(span.sequence, span.start, span.num_tokens) for span in self._parts[micro_batch].spans]
        handle = down.submit(self._copies(stage_idx, micro_batch, ranges), "keys and values")
        self._saved[self._slot(stage_idx, micro_batch)] = self._newest = handle
        return handle

    def _slot(self, stage_idx: int, micro_batch: int) -> int:
        return (self._turn_of_stage[stage_idx] * len(self._parts) + micro_batch) % len(self._slots)

    def _copies(self, stage_idx: int, micro_batch: int, ranges: Iterable[tuple[int, int, int]]) -> list[Copy]:
        """Of so many rows of each sequence, from one on."""
        block, shape = self.block_of_stage[stage_idx], self._shape
        keys, values = self._slots[self._slot(stage_idx, micro_batch)]
        base = self._parts[micro_batch].first * shape.num_rows  # the first row of the slot
        sources = (
            (self._cache.address_k(block), keys, shape.type_k.row_bytes(shape.kv_size)),
            (self._cache.address_v(block), values, shape.type_v.row_bytes(shape.kv_size)),
        )
        return [
            Copy(address + row * row_bytes, place.buffer, place.offset + (row - base) * row_bytes, num * row_bytes)
            for sequence, first, num in ranges
            for row in (sequence * shape.num_rows + first,)
            for address, place, row_bytes in sources
        ]


class DeviceLink:
    """What the executor moves between RAM and the device, on a thread for each direction."""

    def __init__(
        self,
        homes: Mapping[UnitId, DevicePlace],
        slots: Mapping[SlotId, DevicePlace],
        layouts: Mapping[UnitId, DeviceLayout],
        kv: MovingKv | None,
        *,
        tracer: Tracer,
        clock: Clock,
    ) -> None:
        self.places = Places(homes, slots)
        self._layouts = layouts
        self._kv = kv
        self._up = DeviceTransfer(Direction.UP, tracer=tracer, clock=clock)
        self._down = DeviceTransfer(Direction.DOWN, tracer=tracer, clock=clock)

    def load(self, unit: Unit, source: Place, target: DevicePlace, after: Sequence[Handle]) -> Handle:
        offsets = self._layouts[unit.unit_id].offsets
        copies = [
            Copy(source.address + unit.layout.offsets[name], target.buffer, target.offset + offsets[name], num_bytes)
            for name, num_bytes in unit.tensor_bytes.items()
        ]
        return self._up.submit(copies, unit.label, after)

    def load_kv(self, stage_idx: int, micro_batch: int) -> Handle:
        assert self._kv is not None
        return self._kv.load(stage_idx, micro_batch, self._up)

    def save_kv(self, stage_idx: int, micro_batch: int) -> Handle:
        assert self._kv is not None
        return self._kv.save(stage_idx, micro_batch, self._down)

    def close(self) -> None:
        """Closing again does nothing."""
        self._up.close()
        self._down.close()


def _beyond(place: DevicePlace, offset: int) -> DevicePlace:
    return DevicePlace(place.buffer, place.offset + offset)
