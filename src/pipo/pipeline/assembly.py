"""Puts an engine together from its blueprint and placement, every byte reserved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pipo.base.adapter import ADAPTERS, AdapterId, NamedAdapter
from pipo.base.clock import Clock
from pipo.base.errors import ComputeError
from pipo.base.manifest import EMBEDDING_TABLE, HyperParameters
from pipo.base.trace import Tracer
from pipo.base.units import PAGE_BYTES, round_up
from pipo.compute.dequantise import Dequantiser
from pipo.compute.devices import CpuBackend
from pipo.kvcache.cache import KvCache, KvShape
from pipo.models.stage import Stage, banks_of
from pipo.pipeline.adapter_room import AdapterRoom, Budget
from pipo.pipeline.adapters import AdapterStore
from pipo.pipeline.blueprint import Blueprint, vector_bytes, vector_offsets
from pipo.pipeline.buffers import BufferShape, PassBuffers
from pipo.pipeline.device_engine import DeviceEngine, InRam
from pipo.pipeline.embedding import Embedding, embedding_bytes
from pipo.pipeline.executor import Executor, Places
from pipo.pipeline.expert_cache import ExpertCache
from pipo.pipeline.expert_stages import ExpertStages
from pipo.pipeline.expert_units import ExpertUnits, expert_slot_bytes
from pipo.pipeline.forward import Forward
from pipo.pipeline.graph_room import GraphRoom
from pipo.pipeline.kv_room import KvRoom
from pipo.pipeline.sides import CpuMemory, Model, Side, Sides
from pipo.pipeline.stage_graphs import Compute, StageGraphs
from pipo.pipeline.units import Unit, cut_head, make_units
from pipo.pipeline.vectors import vector_data
from pipo.planner.expert_slots import EXPERT_RECORD_BYTES
from pipo.planner.placement import EXPERTS, KV_CACHE, Placement
from pipo.planner.residency import Pool, Residency, SlotId, UnitId, numbered_slots
from pipo.planner.schedule import SCHEDULES
from pipo.store.index import RepackRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, GrowingMemory, Place
from pipo.transfer.disk import DiskTransfer

AHEAD_IN_FLIGHTS = 2  # of what the drive should have been asked for: a finished read waits for its turn
_HELD_BY_PARTS = frozenset({KV_CACHE, "transfer buffers", "norms", ADAPTERS})  # these reserve their own bytes


class Assembly:
    """A running engine's parts, all of whose memory is charged to `ledger`. Close it to give everything back."""

    def __init__(
        self,
        blueprint: Blueprint,
        placement: Placement,
        context_tokens: int,
        limit_bytes: int,
        clock: Clock,
        tracer: Tracer,
        decode_threads: int | None = None,
    ) -> None:
        self.ledger = Ledger(limit_bytes)
        self._exit = ExitStack()
        try:
            choose_threads = _choice_of_threads(blueprint.compute, decode_threads)
            self.transfer, self.forward, self._adapters = self._build(
                blueprint, placement, context_tokens, clock, tracer, choose_threads
            )
        except BaseException:
            self.close()
            raise

    def _build(
        self,
        blueprint: Blueprint,
        placement: Placement,
        context_tokens: int,
        clock: Clock,
        tracer: Tracer,
        choose_threads: Callable[[int], None],
    ) -> tuple[DiskTransfer, Forward, AdapterRoom]:
        for name in placement.fixed.keys() - _HELD_BY_PARTS:
            self._exit.enter_context(self.ledger.reserve(name, placement.fixed[name]))
        stages = self._stages(blueprint, placement)
        units = make_units(stages, blueprint.layouts)
        transfer = self._transfer(blueprint, clock, tracer)
        model = Model(stages, units)
        ram, pool = self._places(units, placement)
        chunk = placement.chunk.num_tokens
        kv, largest = blueprint.kv_shape(context_tokens), blueprint.largest_shapes(context_tokens, chunk)
        buffers = self._buffers(blueprint.buffer_shape(context_tokens, chunk))
        kv_in_ram, blocks = blueprint.kv_shape_in_ram(context_tokens), blueprint.kv_blocks_in_ram
        kv_memory = self._kv_memory(kv_in_ram)
        cache = KvCache(kv_in_ram, kv_memory.place if kv_memory else None, blocks)
        store = AdapterStore(blueprint.manifest, chunk, self.ledger)
        self._exit.callback(store.close)
        adapters = [store.load(named) for named in blueprint.named_adapters]
        in_ram = InRam(self._load_vectors(stages, transfer), buffers, cache, adapters)
        hyper = blueprint.hyper_at(context_tokens)
        graphs = self._graphs(blueprint, hyper)
        graph_room = GraphRoom(graphs, stages, largest, self.ledger, blueprint.adapters)
        self._exit.callback(graph_room.close)
        cpu = Side(model, graphs, CpuMemory(in_ram.vectors, buffers, in_ram.cache, store.addresses))
        residency, sides, link, device = Residency(pool), Sides(cpu), None, None
        if blueprint.device is not None:
            device = DeviceEngine(blueprint.device, model, hyper, in_ram, kv, largest, clock=clock, tracer=tracer)
            self._exit.callback(device.close)
            residency = Residency(pool, device.pool, device.units)
            sides, link = Sides(cpu, device.stages, device.stage_idxs), device.link
        experts = self._experts(blueprint, placement, model, graphs, in_ram)
        residency.experts = experts.cache if experts else None
        executor = Executor(units, ram, residency, transfer, clock, tracer, blueprint.is_aborted, link, experts)
        embedding = self._embedding(blueprint, transfer, executor, chunk)
        schedule = SCHEDULES[blueprint.config.schedule]
        room = None
        if kv_memory is not None:
            room = KvRoom(cache, kv_memory, placement, executor, self.ledger)
            self._exit.callback(room.close)
        spare = self.ledger.limit_bytes - placement.num_bytes
        adapter_room = AdapterRoom(store, stages, graph_room, device, Budget(self.ledger, spare, kv.num_sequences))
        self._exit.callback(adapter_room.close)
        forward = Forward(
            model,
            sides,
            executor,
            embedding,
            buffers,
            kv,
            schedule,
            store,
            room,
            experts,
            moving_kv_sequences=blueprint.moving_kv_sequences,
            choose_threads=choose_threads,
        )
        return transfer, forward, adapter_room

    @property
    def adapters(self) -> dict[AdapterId, NamedAdapter]:
        return self._adapters.store.named

    def add_adapter(self, named: NamedAdapter) -> None:
        """Between passes. Raises OverBudget, OutOfDeviceMemory, TransferError; then nothing has changed."""
        try:
            self._adapters.add(named)
        finally:
            self.forward.forget_bindings()

    def remove_adapter(self, adapter_id: AdapterId) -> None:
        """Between passes; one that is loaded."""
        self._adapters.remove(adapter_id)
        self.forward.forget_bindings()

    def _buffers(self, shape: BufferShape) -> PassBuffers:
        return PassBuffers(shape, self._arena("activations", shape.num_bytes))

    def _kv_memory(self, shape: KvShape) -> GrowingMemory | None:
        """None where all blocks have their keys and values on a device."""
        if not shape.num_bytes:
            return None
        return self._exit.enter_context(GrowingMemory(shape.num_bytes, name=KV_CACHE, ledger=self.ledger))

    def _stages(self, blueprint: Blueprint, placement: Placement) -> Sequence[Stage]:
        """The head in pieces when it streams, whole when it is resident (the results are the same)."""
        if placement.resident[-1]:
            return blueprint.stages
        return cut_head(blueprint.stages, placement.slots[1].slot_bytes)

    def _transfer(self, blueprint: Blueprint, clock: Clock, tracer: Tracer) -> DiskTransfer:
        repack = blueprint.compute.repack

        def repack_rows(rows: RepackRows, num_rows: int, source: int, target: int) -> None:
            if repack is None:
                raise ComputeError("no repacked kernels")
            repack.repack_rows(rows.type, rows.row_elems, num_rows, source, target)

        transfer = DiskTransfer(
            blueprint.manifest.files,
            blueprint.drive,
            identities=blueprint.manifest.identities,
            repack=repack_rows if blueprint.repacks else None,
            group_bytes=blueprint.group_bytes,
            ledger=self.ledger,
            tracer=tracer,
            clock=clock,
        )
        self._exit.callback(transfer.close)
        return transfer

    def _places(self, units: Sequence[Unit], placement: Placement) -> tuple[Places[Place], Pool]:
        # the planner counted the head as one unit, always the last; its pieces share its fate
        last = len(placement.resident) - 1
        resident = [u for u in units if placement.resident[min(u.unit_id, last)]]
        streamed = [u for u in units if not placement.resident[min(u.unit_id, last)]]
        homes = self._make_homes(resident)
        slots: dict[SlotId, Place] = {}
        free = numbered_slots([each.num_slots for each in placement.slots])
        for ids, each in zip(free, placement.slots, strict=True):
            slots |= zip(ids, self._split("slots", [each.slot_bytes] * each.num_slots), strict=True)
        for ids, experts in zip(_ids_of_expert_slots(placement), placement.expert_slots, strict=True):
            slots |= zip(ids, self._split(EXPERTS, [experts.slot_bytes] * experts.num_slots), strict=True)
            self._exit.enter_context(self.ledger.reserve(EXPERTS, experts.num_slots * EXPERT_RECORD_BYTES))
        classes = {u.unit_id: placement.slot_class[min(u.unit_id, last)] for u in streamed}
        return Places(homes, slots), Pool(classes, free, {u.unit_id for u in resident})

    def _experts(
        self,
        blueprint: Blueprint,
        placement: Placement,
        model: Model,
        graphs: StageGraphs,
        ram: InRam,
    ) -> ExpertStages | None:
        """None for a dense model."""
        if not placement.expert_slots:
            return None
        units = ExpertUnits(model.stages, blueprint.layouts, len(model.units))
        sizes = [each.slot_bytes for each in placement.expert_slots]
        banks = banks_of(model.stages)
        slot_class = [sizes.index(expert_slot_bytes(bank, blueprint.layouts)) for bank in banks]
        cache = ExpertCache(units.ids, slot_class, _ids_of_expert_slots(placement))
        num_ahead = -(-AHEAD_IN_FLIGHTS * blueprint.drive.in_flight_bytes // max(sizes))
        num_ahead = max(num_ahead, banks[0].num_experts_per_tok)
        return ExpertStages(model.stages, units, cache, graphs, ram.buffers, ram.vectors, num_ahead)

    def _make_homes(self, resident: Sequence[Unit]) -> dict[UnitId, Place]:
        places = self._split("resident weights", [u.layout.num_bytes for u in resident])
        return {u.unit_id: place for u, place in zip(resident, places, strict=True)}

    def _load_vectors(self, stages: Sequence[Stage], transfer: DiskTransfer) -> dict[str, int]:
        offsets = vector_offsets(stages)
        place = self._arena("norms", vector_bytes(stages))
        specs = {spec.name: spec for stage in stages for spec in stage.vectors.values()}
        for name, offset in offsets.items():
            spec = specs[name]
            place.view[offset : offset + spec.num_bytes] = vector_data(spec, transfer.read_now)
        return {name: place.address + offset for name, offset in offsets.items()}

    def _graphs(self, blueprint: Blueprint, hyper: HyperParameters) -> StageGraphs:
        graphs = StageGraphs(blueprint.compute, hyper, blueprint.layouts)
        self._exit.callback(graphs.close)
        return graphs

    def _embedding(self, blueprint: Blueprint, transfer: DiskTransfer, executor: Executor, chunk: int) -> Embedding:
        table = blueprint.manifest.tensors[EMBEDDING_TABLE]
        dequantiser = Dequantiser(blueprint.compute.lib, table.type)
        self._exit.enter_context(self.ledger.reserve("activations", embedding_bytes(table, chunk)))
        scale = blueprint.manifest.hyper.embedding_scale
        return Embedding(table, transfer, executor.wait_for, dequantiser, chunk, scale)

    def _arena(self, name: str, num_bytes: int) -> Place:
        return self._split(name, [num_bytes])[0]

    def _split(self, name: str, sizes: Sequence[int]) -> list[Place]:
        """One arena cut into page-aligned places."""
        total = sum(round_up(size, PAGE_BYTES) for size in sizes)
        if not total:
            return []
        arena = self._exit.enter_context(Arena(total, name=name, ledger=self.ledger))
        return [arena.take(size) for size in sizes]

    def close(self) -> None:
        self._exit.close()


def _ids_of_expert_slots(placement: Placement) -> list[deque[SlotId]]:
    """By class, after those of all other slots."""
    first = sum(each.num_slots for each in placement.slots)
    return numbered_slots([each.num_slots for each in placement.expert_slots], first)


def _choice_of_threads(compute: Compute, decode_threads: int | None) -> Callable[[int], None]:
    """By the tokens of a pass."""
    backend = compute.backend
    assert isinstance(backend, CpuBackend)

    def choose(num_tokens: int) -> None:
        backend.use_threads(decode_threads if decode_threads and num_tokens == 1 else backend.num_threads)

    return choose
