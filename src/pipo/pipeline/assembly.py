"""Puts an engine together: what it would take (a Demand for the planner), then the real thing, every byte reserved."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType

from pipo.base.clock import Clock
from pipo.base.config import EngineConfig
from pipo.base.errors import ComputeError
from pipo.base.manifest import Manifest
from pipo.base.tensor_type import ROWS_PER_GROUP, TensorType
from pipo.base.trace import Tracer
from pipo.base.units import PAGE_BYTES, round_up
from pipo.compute.dequantise import Dequantiser
from pipo.compute.devices import CpuBackend
from pipo.compute.repack import RepackBuffer
from pipo.kvcache.cache import CACHE_TYPES, KvCache, KvShape, kv_rows_class, kv_shape
from pipo.models.stage import ShapeClass, Stage, StageKind
from pipo.pipeline.buffers import BufferShape, PassBuffers
from pipo.pipeline.embedding import Embedding, embedding_bytes
from pipo.pipeline.executor import Executor, Places
from pipo.pipeline.forward import EMBEDDING_TABLE, Forward, Sides
from pipo.pipeline.sides import CpuMemory, Model, Side
from pipo.pipeline.stage_graphs import Compute, StageGraphs, graphs_bytes
from pipo.pipeline.units import Unit, WeightLayouts, cut_head, make_units, unit_sizes
from pipo.planner.placement import ChunkCost, Demand, Placement
from pipo.planner.residency import Pool, Residency, SlotId, UnitId
from pipo.planner.schedule import SCHEDULES
from pipo.store.index import RepackRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.disk import DiskTransfer, DriveSettings

CHUNKS = (16, 32, 64, 128, 256, 512)  # prefill chunks the planner may choose from
# what Python and ggml grow by while answering: sampling arrays, token lists, thread stacks
GROWTH_BYTES = 12 << 20
# of the context: turns are encoded while all else is taken. The tokenizers library takes up to 800 bytes a token of
# prose meanwhile, and a text that is refused only once it is encoded may have a quarter too many (Tokenizer.is_longer)
ENCODING_BYTES_PER_TOKEN = 1000
ANSWER_BYTES_PER_TOKEN = 256  # of the context: each token of an answer, its text and its places in lists
_HELD_BY_PARTS = frozenset({"KV cache", "transfer buffers", "norms"})  # these reserve their own bytes
# repacking costs more than it saves while weights stream, except where it runs at several GB/s a thread
FAST_TO_REPACK = frozenset({TensorType.Q4_0, TensorType.IQ4_NL})


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What is known of a model before any memory is taken. `stages` has the head in one piece."""

    manifest: Manifest
    stages: Sequence[Stage]
    layouts: WeightLayouts
    compute: Compute
    config: EngineConfig
    drive: DriveSettings

    def kv_shape(self, context_tokens: int) -> KvShape:
        types = CACHE_TYPES[self.config.cache_type_k], CACHE_TYPES[self.config.cache_type_v]
        return kv_shape(self.manifest.hyper, context_tokens, *types)

    def buffer_shape(self, context_tokens: int, chunk_tokens: int) -> BufferShape:
        h, rows = self.manifest.hyper, kv_rows_class(context_tokens)
        return BufferShape(h.hidden_size, h.vocab_size, chunk_tokens, rows, self.config.max_outputs)

    def largest_shape(self, context_tokens: int, chunk_tokens: int) -> ShapeClass:
        kv = self.kv_shape(context_tokens)
        return ShapeClass(chunk_tokens, kv.num_rows, self.config.max_outputs, kv.type_k, kv.type_v)

    def is_aborted(self) -> bool:
        assert isinstance(self.compute.backend, CpuBackend)
        return self.compute.backend.abort.is_set

    @property
    def bounce_bytes(self) -> int:
        """Read buffers of the transfer workers: for rows on their way through repacking, and for embeddings."""
        is_repacking = bool(self.layouts.repacked)
        return round_up(self.drive.bounce_bytes(repacks=is_repacking, group_bytes=self.group_bytes), PAGE_BYTES)

    @property
    def group_bytes(self) -> int:
        """The largest group of rows that is repacked at once."""
        specs = (self.manifest.tensors[name] for name in self.layouts.repacked)
        return ROWS_PER_GROUP * max((spec.type.row_bytes(spec.shape[0]) for spec in specs), default=0)


def choose_layouts(
    stages: Sequence[Stage], repack: RepackBuffer | None, wanted: str, all_resident: bool
) -> WeightLayouts:
    """Which weights to keep repacked. `wanted` is EngineConfig.layout.

    "auto" takes Q4_0 and IQ4_NL always, the other types only when every weight stays in RAM: repacking Q4_K at 2 GB/s
    a thread would cost a streaming engine more than the faster product gives back.
    """
    if repack is None or wanted == "plain":
        return WeightLayouts(frozenset())
    names = set()
    for stage in stages:
        for spec in stage.matrices.values():
            is_chosen = wanted == "repacked" or all_resident or spec.type in FAST_TO_REPACK
            if is_chosen and repack.supports(spec.type, spec.shape):
                names.add(spec.name)
    return WeightLayouts(frozenset(names))


def demand(
    blueprint: Blueprint,
    context_tokens: int,
    limit_bytes: int,
    process_bytes: int,
    kept_bytes: Mapping[str, int] = MappingProxyType({}),
) -> Demand:
    """What the model needs at this context, for the planner. `kept_bytes` is what a caller wants kept besides."""
    graphs = StageGraphs(blueprint.compute, blueprint.manifest.hyper, blueprint.layouts)
    try:
        chunks = [
            ChunkCost(t, _chunk_bytes(blueprint, graphs, context_tokens, t)) for t in _chunks(blueprint, context_tokens)
        ]
    finally:
        graphs.close()
    fixed = {
        "KV cache": round_up(blueprint.kv_shape(context_tokens).num_bytes, PAGE_BYTES),
        "transfer buffers": blueprint.bounce_bytes,
        "norms": _vector_bytes(blueprint.stages),
        "graphs": graphs_bytes(len(blueprint.stages)),
        "encoding": round_up(context_tokens * ENCODING_BYTES_PER_TOKEN, PAGE_BYTES),
        "answer": round_up(context_tokens * ANSWER_BYTES_PER_TOKEN, PAGE_BYTES),
        "process": process_bytes + GROWTH_BYTES,
        **kept_bytes,
    }
    in_flight = blueprint.drive.chunk_bytes * blueprint.drive.num_workers
    return Demand(unit_sizes(blueprint.stages, blueprint.layouts), fixed, chunks, limit_bytes, in_flight)


def _chunks(blueprint: Blueprint, context_tokens: int) -> list[int]:
    if blueprint.config.prefill_chunk is not None:
        return [min(blueprint.config.prefill_chunk, context_tokens)]
    return sorted({min(chunk, context_tokens) for chunk in CHUNKS})


def _chunk_bytes(blueprint: Blueprint, graphs: StageGraphs, context_tokens: int, chunk_tokens: int) -> int:
    measured = graphs.measure(blueprint.stages, blueprint.largest_shape(context_tokens, chunk_tokens))
    rows = embedding_bytes(blueprint.manifest.tensors[EMBEDDING_TABLE], chunk_tokens)
    return measured + rows + round_up(blueprint.buffer_shape(context_tokens, chunk_tokens).num_bytes, PAGE_BYTES)


def _vectors(stages: Sequence[Stage]) -> dict[str, int]:
    """Offset of each distinct vector in their shared place."""
    offsets: dict[str, int] = {}
    end = 0
    for stage in stages:
        for spec in stage.vectors.values():
            if spec.name not in offsets:
                offsets[spec.name] = end
                end += round_up(spec.num_bytes, 128)
    return offsets


def _vector_bytes(stages: Sequence[Stage]) -> int:
    sizes = {spec.name: round_up(spec.num_bytes, 128) for stage in stages for spec in stage.vectors.values()}
    return round_up(sum(sizes.values()), PAGE_BYTES)


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
    ) -> None:
        self.ledger = Ledger(limit_bytes)
        self._exit = ExitStack()
        try:
            self.transfer, self.forward = self._build(blueprint, placement, context_tokens, clock, tracer)
        except BaseException:
            self.close()
            raise

    def _build(
        self, blueprint: Blueprint, placement: Placement, context_tokens: int, clock: Clock, tracer: Tracer
    ) -> tuple[DiskTransfer, Forward]:
        for name in placement.fixed.keys() - _HELD_BY_PARTS:
            self._exit.enter_context(self.ledger.reserve(name, placement.fixed[name]))
        stages = self._stages(blueprint, placement)
        units = make_units(stages, blueprint.layouts)
        transfer = self._transfer(blueprint, clock, tracer)
        homes, slots, residency = self._places(units, placement)
        self._stage_list, self._units, self._homes, self._slots = stages, units, homes, slots
        executor = Executor(
            units,
            Places(homes, slots),
            residency,
            transfer,
            clock,
            tracer,
            blueprint.is_aborted,
        )
        chunk = placement.chunk.num_tokens
        buffers = self._arena("activations", blueprint.buffer_shape(context_tokens, chunk).num_bytes)
        cache = self._arena("KV cache", blueprint.kv_shape(context_tokens).num_bytes)
        model, kv = Model(stages, units), blueprint.kv_shape(context_tokens)
        pass_buffers = PassBuffers(blueprint.buffer_shape(context_tokens, chunk), buffers)
        memory = CpuMemory(self._load_vectors(stages, transfer), pass_buffers, KvCache(kv, cache))
        forward = Forward(
            model,
            Sides(Side(model, self._graphs(blueprint, stages, context_tokens, chunk), memory)),
            executor,
            self._embedding(blueprint, transfer, executor, chunk),
            pass_buffers,
            kv,
            SCHEDULES[blueprint.config.schedule],
        )
        return transfer, forward

    def measure_compute_s(self, weight_bytes: int) -> float:
        """Predicted seconds of compute in a pass of one token: the time of the first MLP, scaled by bytes.

        Reads that unit once more than the first pass will.
        """
        unit = next(u for u in self._units if self._stage_list[u.stage_idx].kind is StageKind.MLP)
        place = self._homes.get(unit.unit_id) or self._slots[SlotId(len(self._slots) - 1)]
        self.transfer.submit(unit.layout.reads, place, "calibration").wait()
        return self.forward.time_stage(unit.stage_idx, place) * weight_bytes / unit.num_bytes

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
            repack=repack_rows if blueprint.layouts.repacked else None,
            group_bytes=blueprint.group_bytes,
            ledger=self.ledger,
            tracer=tracer,
            clock=clock,
        )
        self._exit.callback(transfer.close)
        return transfer

    def _places(
        self, units: Sequence[Unit], placement: Placement
    ) -> tuple[dict[UnitId, Place], dict[SlotId, Place], Residency]:
        # the planner counted the head as one unit, always the last; its pieces share its fate
        last = len(placement.resident) - 1
        resident = [u for u in units if placement.resident[min(u.unit_id, last)]]
        streamed = [u for u in units if not placement.resident[min(u.unit_id, last)]]
        homes = self._make_homes(resident)
        slots: dict[SlotId, Place] = {}
        free: list[deque[SlotId]] = []
        for slot_class in placement.slots:
            ids = [SlotId(len(slots) + i) for i in range(slot_class.num_slots)]
            places = self._split("slots", [slot_class.slot_bytes] * slot_class.num_slots)
            slots |= dict(zip(ids, places, strict=True))
            free.append(deque(ids))
        classes = {u.unit_id: placement.slot_class[min(u.unit_id, last)] for u in streamed}
        return homes, slots, Residency(Pool(classes, free, {u.unit_id for u in resident}))

    def _make_homes(self, resident: Sequence[Unit]) -> dict[UnitId, Place]:
        places = self._split("resident weights", [u.layout.num_bytes for u in resident])
        return {u.unit_id: place for u, place in zip(resident, places, strict=True)}

    def _load_vectors(self, stages: Sequence[Stage], transfer: DiskTransfer) -> dict[str, int]:
        offsets = _vectors(stages)
        place = self._arena("norms", _vector_bytes(stages))
        specs = {spec.name: spec for stage in stages for spec in stage.vectors.values()}
        for name, offset in offsets.items():
            spec = specs[name]
            place.view[offset : offset + spec.num_bytes] = transfer.read_now(spec.extent)
        return {name: place.address + offset for name, offset in offsets.items()}

    def _graphs(self, blueprint: Blueprint, stages: Sequence[Stage], context_tokens: int, chunk: int) -> StageGraphs:
        graphs = StageGraphs(blueprint.compute, blueprint.manifest.hyper, blueprint.layouts)
        self._exit.callback(graphs.close)
        shape = blueprint.largest_shape(context_tokens, chunk)
        self._exit.enter_context(self.ledger.reserve("activations", graphs.measure(stages, shape)))
        graphs.reserve(stages, shape)
        return graphs

    def _embedding(self, blueprint: Blueprint, transfer: DiskTransfer, executor: Executor, chunk: int) -> Embedding:
        table = blueprint.manifest.tensors[EMBEDDING_TABLE]
        dequantiser = Dequantiser(blueprint.compute.lib, table.type)
        self._exit.enter_context(self.ledger.reserve("activations", embedding_bytes(table, chunk)))
        return Embedding(table, transfer, executor.wait_for, dequantiser, chunk)

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
