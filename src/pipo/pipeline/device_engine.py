"""Puts the device's part of an engine together, every byte charged to the device's own ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from pipo.base.adapter import Adapter, AdapterId
from pipo.base.clock import Clock
from pipo.base.manifest import HyperParameters
from pipo.base.trace import Tracer
from pipo.compute.device import ComputeDevice, DevicePlace
from pipo.compute.device_backend import DeviceBackend
from pipo.kvcache.cache import KvCache, KvShape
from pipo.models.stage import ShapeClass, Stage, StageKind
from pipo.pipeline.adapters import LoadedAdapter
from pipo.pipeline.buffers import PassBuffers
from pipo.pipeline.device_adapters import DeviceAdapters
from pipo.pipeline.device_layout import unit_on_device, vectors_on_device
from pipo.pipeline.device_share import PLAIN, DeviceShare, array_bytes, kv_sizes
from pipo.pipeline.device_stages import DeviceStages
from pipo.pipeline.device_tier import DeviceArena, DeviceLink, DeviceMemory, MovingKv
from pipo.pipeline.graph_room import GraphRoom
from pipo.pipeline.sides import Model
from pipo.pipeline.stage_graphs import Compute, StageGraphs
from pipo.planner.device_placement import num_kv_slots
from pipo.planner.residency import Pool, SlotId, UnitId, numbered_slots
from pipo.tiers.ledger import Ledger

KvPlaces = dict[int, tuple[DevicePlace, DevicePlace]]


@dataclass(frozen=True, slots=True)
class InRam:
    """What the device's part reads and writes there: vectors by address, the arrays of a pass, the cache of the
    blocks that have theirs in RAM.
    """

    vectors: Mapping[str, int]
    buffers: PassBuffers
    cache: KvCache
    adapters: Sequence[LoadedAdapter]


class DeviceEngine:
    """All that lies and runs on one device. Close it to give its memory back.

    `kv` is the shape of all blocks' cache, `shapes` the largest passes. Raises OverBudget where the plan exceeds the
    device's limit, OutOfDeviceMemory where the device has less.
    """

    def __init__(
        self,
        share: DeviceShare,
        model: Model,
        hyper: HyperParameters,
        ram: InRam,
        kv: KvShape,
        shapes: Sequence[ShapeClass],
        *,
        clock: Clock,
        tracer: Tracer,
    ) -> None:
        self.ledger = Ledger(share.limit_bytes, of=share.device.name, flag="--vram")
        self.stage_idxs = frozenset(i for i, stage in enumerate(model.stages) if share.is_here(stage))
        self._share = share
        self._model = model
        self._units = [unit for unit in model.units if unit.stage_idx in self.stage_idxs]
        assert isinstance(share.device, ComputeDevice), "an engine runs on what is here"
        self._device = share.device
        self._exit = ExitStack()
        self._arena = DeviceArena(self._device, self.ledger)
        self._exit.callback(self._arena.close)
        # closed before the memory is given back: a queue's descriptors name it, and drivers may follow them later
        self._backend = self._exit.enter_context(DeviceBackend(self._device))
        try:
            self._build(hyper, ram, kv, shapes, clock, tracer)
        except BaseException:
            self.close()
            raise

    @property
    def units(self) -> frozenset[UnitId]:
        return frozenset(unit.unit_id for unit in self._units)

    @property
    def _stages_here(self) -> list[Stage]:
        return [self._model.stages[i] for i in sorted(self.stage_idxs)]

    def _build(
        self,
        hyper: HyperParameters,
        ram: InRam,
        kv: KvShape,
        shapes: Sequence[ShapeClass],
        clock: Clock,
        tracer: Tracer,
    ) -> None:
        stages = self._model.stages
        layouts = {unit.unit_id: unit_on_device(stages[unit.stage_idx], self._device) for unit in self._units}
        sizes = {unit_id: layout.num_bytes for unit_id, layout in layouts.items()}
        homes = self._make_homes(sizes)
        slots, self.pool = self._make_slots(sizes.keys() - homes.keys())
        moving, kv_places = self._place_kv(kv, ram.cache)
        vectors, arrays = self._load_vectors(ram.vectors), self._place_arrays(ram.buffers)
        self._adapters = self._load_adapters(ram)
        memory = DeviceMemory(vectors, layouts, arrays, kv_places, kv, self._adapters.places, self._device.alignment)
        graphs = self._graphs(hyper)
        adapters = [each.named.adapter for each in ram.adapters]
        self._graph_room = GraphRoom(graphs, self._stages_here, shapes, self.ledger, adapters)
        self._exit.callback(self._graph_room.close)
        self.stages = DeviceStages(self._model, graphs, memory, ram.buffers, moving)
        self.link = DeviceLink(homes, slots, layouts, moving, tracer=tracer, clock=clock)
        self._exit.callback(self.link.close)

    def _make_homes(self, sizes: Mapping[UnitId, int]) -> dict[UnitId, DevicePlace]:
        stays = self._share.placement.resident
        staying = {unit_id: size for unit_id, size in sizes.items() if stays[self._fate(unit_id)]}
        return dict(zip(staying, self._arena.take("resident weights", list(staying.values())), strict=True))

    def _make_slots(self, passing: set[UnitId]) -> tuple[dict[SlotId, DevicePlace], Pool]:
        placement = self._share.placement
        slots: dict[SlotId, DevicePlace] = {}
        free = numbered_slots([each.num_slots for each in placement.slots])
        for ids, each in zip(free, placement.slots, strict=True):
            slots |= zip(ids, self._arena.take("slots", [each.slot_bytes] * each.num_slots), strict=True)
        classes = {unit_id: placement.slot_class[self._fate(unit_id)] for unit_id in passing}
        return slots, Pool(classes, free, set(self.units - passing))

    def _fate(self, unit_id: UnitId) -> int:
        """The planner counted the head as one unit, always the last; its pieces share its fate."""
        return min(unit_id, len(self._share.placement.computes) - 1)

    def _load_vectors(self, in_ram: Mapping[str, int]) -> dict[str, DevicePlace]:
        stages = self._stages_here
        layout = vectors_on_device(stages, self._device)
        (base,) = self._arena.take("norms", [layout.num_bytes])
        places = {name: DevicePlace(base.buffer, base.offset + offset) for name, offset in layout.offsets.items()}
        for spec in (spec for stage in stages for spec in stage.vectors.values()):
            place = places[spec.name]
            place.buffer.upload(place.offset, in_ram[spec.name], spec.num_bytes)
        return places

    def _place_arrays(self, buffers: PassBuffers) -> dict[str, DevicePlace]:
        sizes = array_bytes(buffers.shape, self._device)
        return dict(zip(sizes, self._arena.take("activations", list(sizes.values())), strict=True))

    def _place_kv(self, kv: KvShape, cache: KvCache) -> tuple[MovingKv | None, KvPlaces]:
        block_of_stage = {
            i: self._model.stages[i].block_idx
            for i in sorted(self.stage_idxs)
            if self._model.stages[i].kind is StageKind.ATTENTION
        }
        most = self._share.placement.kv_sequences
        if not most:
            pairs = self._kv_pairs(kv, len(block_of_stage))
            return None, dict(zip(block_of_stage.values(), pairs, strict=True))
        num_slots = num_kv_slots(len(block_of_stage), kv.num_sequences, most)
        pairs = self._kv_pairs(replace(kv, num_sequences=most), num_slots)
        return MovingKv(kv, cache, pairs, block_of_stage), {}

    def _kv_pairs(self, kv: KvShape, num: int) -> list[tuple[DevicePlace, DevicePlace]]:
        places = self._arena.take("KV cache", kv_sizes(kv, self._device) * num)
        return list(zip(places[::2], places[1::2], strict=True))

    def _graphs(self, hyper: HyperParameters) -> StageGraphs:
        graphs = StageGraphs(Compute(self._device.lib, self._backend), hyper, PLAIN)
        self._exit.callback(graphs.close)
        return graphs

    def _load_adapters(self, ram: InRam) -> DeviceAdapters:
        adapters = DeviceAdapters(self._device, self.ledger, self._stages_here, ram.buffers.shape)
        # like all memory here, it is given back after the queue was closed
        self._arena.keep(adapters.close)
        for loaded in ram.adapters:
            adapters.load(loaded)
        return adapters

    def add_adapter(self, loaded: LoadedAdapter, adapters: Sequence[Adapter]) -> None:
        """Between passes. `adapters` are all there will be. Raises OverBudget, OutOfDeviceMemory, ComputeError; then
        nothing has changed.
        """
        with self._queue_closed():
            self._adapters.load(loaded)
            try:
                self._graph_room.hold(adapters)
            except BaseException:
                self._adapters.unload(loaded.named.id)
                raise

    def remove_adapter(self, adapter_id: AdapterId) -> None:
        """Between passes."""
        with self._queue_closed():
            self._adapters.unload(adapter_id)

    @contextmanager
    def _queue_closed(self) -> Iterator[None]:
        """While memory is given back that it may have named."""
        self._backend.close()
        try:
            yield
        finally:
            self._backend.reopen()

    def close(self) -> None:
        self._exit.close()
