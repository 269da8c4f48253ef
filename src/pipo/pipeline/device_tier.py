"""The device's share of a running engine: its memory, what is copied there and back, and the stages it computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from pipo.base.clock import Clock
from pipo.base.trace import Tracer
from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice, DeviceBuffer, DevicePlace
from pipo.compute.graph import Binding, Graph
from pipo.kvcache.cache import KvCache, KvShape
from pipo.models.stage import ShapeClass
from pipo.pipeline.adapters import NO_ADAPTERS, ActiveAdapters
from pipo.pipeline.buffers import LOCAL_MASK, MIXED, ROUTING, PassBuffers
from pipo.pipeline.device_layout import DeviceLayout
from pipo.pipeline.executor import Places
from pipo.pipeline.sides import Side
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
    """Where the leaves of the device's graphs lie. `kv` gives the places of a block's keys and values."""

    vectors: Mapping[str, DevicePlace]
    layouts: Mapping[UnitId, DeviceLayout]
    arrays: Mapping[str, DevicePlace]
    kv: Mapping[int, tuple[DevicePlace, DevicePlace]]
    kv_shape: KvShape
    adapters: Mapping[str, DevicePlace]  # by key; those of stages that compute here, and scales

    def vector(self, name: str) -> DevicePlace:
        return self.vectors[name]

    def matrix(self, unit: Unit, name: str, place: Place | DevicePlace) -> DevicePlace:
        assert isinstance(place, DevicePlace)
        return _beyond(place, self.layouts[unit.unit_id].offsets[name])

    @property
    def stage_arrays(self) -> Collection[str]:
        return self.arrays.keys() - {"logits"}

    def array(self, name: str) -> DevicePlace:
        return self.arrays[name]

    def adapter(self, key: str) -> DevicePlace:
        return self.adapters[key]

    def logits(self, first_row: int, num_outputs: int) -> DevicePlace:
        return _beyond(self.arrays["logits"], PassBuffers.logits_offset(first_row, num_outputs))

    def keys_and_values(self, block_idx: int, sequence: int) -> tuple[DevicePlace, DevicePlace]:
        keys, values = self.kv[block_idx]
        shape = self.kv_shape
        return _beyond(keys, sequence * shape.sequence_bytes_k), _beyond(values, sequence * shape.sequence_bytes_v)

    def bind(self, graph: Graph, leaves: Mapping[str, DevicePlace]) -> Binding:
        return graph.device_binding(leaves)


class MovingKv:
    """Keys and values that live in RAM, and pass through slots on the device while their stage computes.

    `block_of_stage` are the attention stages that compute there, in order; they take the slots in turn.
    """

    def __init__(
        self,
        shape: KvShape,
        cache: KvCache,
        slots: Sequence[tuple[DevicePlace, DevicePlace]],
        block_of_stage: Mapping[int, int],
    ) -> None:
        self._shape = shape
        self._cache = cache
        self._block_of_stage = block_of_stage
        self._slot_of_stage = {stage: i % len(slots) for i, stage in enumerate(block_of_stage)}
        self._slots = slots
        self._saved: dict[int, Handle] = {}  # by slot: the newest save from it
        self.rows = PassRows(())  # of the pass: positions before the starts are loaded, those after them saved

    @property
    def places(self) -> dict[int, tuple[DevicePlace, DevicePlace]]:
        """Of keys and values, by block."""
        return {block: self._slots[self._slot_of_stage[stage]] for stage, block in self._block_of_stage.items()}

    def load(self, stage_idx: int, up: DeviceTransfer) -> Handle:
        saved = self._saved.get(self._slot_of_stage[stage_idx])
        copies = [c for span in self.rows.spans for c in self._rows(stage_idx, span.sequence, 0, span.start)]
        return up.submit(copies, "keys and values", [saved] if saved else [])

    def save(self, stage_idx: int, down: DeviceTransfer) -> Handle:
        copies = [
            c for span in self.rows.spans for c in self._rows(stage_idx, span.sequence, span.start, span.num_tokens)
        ]
        handle = down.submit(copies, "keys and values")
        self._saved[self._slot_of_stage[stage_idx]] = handle
        return handle

    def _rows(self, stage_idx: int, sequence: int, first: int, num_rows: int) -> list[Copy]:
        """Of one sequence."""
        block = self._block_of_stage[stage_idx]
        keys, values = self._slots[self._slot_of_stage[stage_idx]]
        first += sequence * self._shape.num_rows
        sources = (
            (self._cache.address_k(block), keys, self._shape.type_k.row_bytes(self._shape.kv_size)),
            (self._cache.address_v(block), values, self._shape.type_v.row_bytes(self._shape.kv_size)),
        )
        return [
            Copy(address + first * row_bytes, place.buffer, place.offset + first * row_bytes, num_rows * row_bytes)
            for address, place, row_bytes in sources
        ]


class DeviceStages:
    """Computes the device's stages, and carries a pass's inputs and results between RAM and the device.

    Those copies are small and block. Threads: one at a time.
    """

    def __init__(
        self, side: Side[DevicePlace], memory: DeviceMemory, buffers: PassBuffers, moving_kv: MovingKv | None
    ) -> None:
        self._side = side
        self._memory = memory
        self._buffers = buffers
        self._moving_kv = moving_kv
        self._adapters = NO_ADAPTERS

    def take_shape(
        self, shape: ShapeClass, stage_idxs: Sequence[int], firsts: tuple[int, ...], adapters: ActiveAdapters
    ) -> None:
        self._adapters = adapters
        self._side.take_shape(shape, stage_idxs, firsts, adapters)

    def forget_places(self) -> None:
        self._side.forget_places()

    def compute(self, stage_idx: int, place: Place | DevicePlace | None) -> None:
        self._side.compute(stage_idx, place)

    def compute_all(self, place_of: Callable[[int], Place | DevicePlace | None]) -> None:
        self._side.compute_all(place_of)

    def begin_pass(self, rows: PassRows) -> None:
        if self._moving_kv is not None:
            self._moving_kv.rows = rows
        for name in ("positions", "kv_rows", "mask", LOCAL_MASK, "out_rows", *MIXED[1:]):
            if name in self._memory.arrays:
                self._move(name, DeviceBuffer.upload)
        for loaded in self._adapters.loaded:
            for key in loaded.scale_keys:
                place = self._memory.adapter(key)
                place.buffer.upload(place.offset, loaded.addresses[key], rows.num_tokens * 4)

    def bring_hidden(self) -> None:
        self._move("hidden", DeviceBuffer.upload)

    def return_results(self) -> None:
        for name in ("hidden", *ROUTING):
            if name in self._memory.arrays:
                self._move(name, DeviceBuffer.download)

    def return_logits(self) -> None:
        self._move("logits", DeviceBuffer.download)

    def return_normed(self) -> None:
        self._move("normed", DeviceBuffer.download)

    def _move(self, name: str, move: Callable[[DeviceBuffer, int, int, int], None]) -> None:
        place, num_bytes = self._memory.array(name), self._buffers.used_bytes[name]
        if num_bytes:
            move(place.buffer, place.offset, self._buffers.addresses[name], num_bytes)


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

    def load_kv(self, stage_idx: int) -> Handle:
        assert self._kv is not None
        return self._kv.load(stage_idx, self._up)

    def save_kv(self, stage_idx: int) -> Handle:
        assert self._kv is not None
        return self._kv.save(stage_idx, self._down)

    def close(self) -> None:
        """Closing again does nothing."""
        self._up.close()
        self._down.close()


def _beyond(place: DevicePlace, offset: int) -> DevicePlace:
    return DevicePlace(place.buffer, place.offset + offset)
