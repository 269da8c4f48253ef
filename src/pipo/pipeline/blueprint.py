"""What is known of a running engine before any memory is taken: sizes and choices, and what they add up to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pipo.base.adapter import ADAPTERS, Adapter, NamedAdapter
from pipo.base.config import EngineConfig
from pipo.base.manifest import EMBEDDING_TABLE, HyperParameters, Manifest, TensorSpec
from pipo.base.tensor_type import ROWS_PER_GROUP
from pipo.base.units import MIB, PAGE_BYTES, round_up
from pipo.compute.devices import CpuBackend
from pipo.compute.repack import FAST_TO_REPACK, RepackBuffer
from pipo.kvcache.cache import CACHE_TYPES, ROWS_PER_PAGE, KvShape, kv_rows_class, kv_shape
from pipo.models.stage import KvGroup, ShapeClass, Stage, banks_of
from pipo.pipeline.adapters import adapter_bytes
from pipo.pipeline.buffers import BufferShape, ExpertCounts
from pipo.pipeline.device_share import DeviceShare
from pipo.pipeline.embedding import embedding_bytes
from pipo.pipeline.expert_units import expert_slot_bytes
from pipo.pipeline.stage_graphs import Compute, StageGraphs, correction_bytes, graphs_bytes
from pipo.pipeline.units import WeightLayouts, unit_sizes
from pipo.planner.expert_slots import ExpertClass
from pipo.planner.placement import KV_CACHE, ChunkCost, Demand, KvPage, UnitSize
from pipo.transfer.disk import DriveSettings

CHUNKS = (16, 32, 64, 128, 256, 512)  # prefill chunks the planner may choose from
NARROW_DRIVE = DriveSettings(chunk_bytes=MIB // 2, num_workers=4)  # for budgets that hold no larger buffers
# what Python and ggml grow by while answering: sampling arrays, token lists, thread stacks
GROWTH_BYTES = 12 << 20
# of the context: turns are encoded while all else is taken. The tokenizers library takes up to 800 bytes a token of
# prose meanwhile, and a text that is refused only once it is encoded may have a quarter too many (Tokenizer.is_longer)
ENCODING_BYTES_PER_TOKEN = 1000
ANSWER_BYTES_PER_TOKEN = 256  # of the context: each token of an answer, its text and its places in lists


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What is known of a model before any memory is taken. `stages` has the head in one piece."""

    manifest: Manifest
    stages: Sequence[Stage]
    layouts: WeightLayouts
    compute: Compute
    config: EngineConfig
    drive: DriveSettings
    device: DeviceShare | None = None
    named_adapters: tuple[NamedAdapter, ...] = ()  # that it begins with

    @property
    def adapters(self) -> list[Adapter]:
        return [each.adapter for each in self.named_adapters]

    def kv_shape(self, context_tokens: int) -> KvShape:
        """Of all blocks and sequences."""
        types = CACHE_TYPES[self.config.cache_type_k], CACHE_TYPES[self.config.cache_type_v]
        pass_tokens = self.config.prefill_chunk or CHUNKS[-1]
        return kv_shape(self.manifest.hyper, context_tokens, *types, self.config.num_sequences, pass_tokens)

    def kv_shape_in_ram(self, context_tokens: int) -> KvShape:
        """Of the blocks whose keys and values live there."""
        shape, blocks = self.kv_shape(context_tokens), self.kv_blocks_in_ram
        sliding = tuple(shape.sliding[block] for block in blocks) if shape.sliding else ()
        return replace(shape, num_layers=len(blocks), sliding=sliding)

    @property
    def moving_kv_sequences(self) -> int:
        """Whose keys and values are on the device at a time, where those of its blocks live in RAM; else 0."""
        return self.device.placement.kv_sequences if self.device is not None else 0

    @property
    def kv_blocks_in_ram(self) -> list[int]:
        kept_elsewhere = self.device.kv_blocks if self.device else frozenset()
        return [block for block in range(self.manifest.hyper.num_layers) if block not in kept_elsewhere]

    @property
    def unit_sizes(self) -> list[UnitSize]:
        sizes = unit_sizes(self.stages, self.layouts)
        if self.device is None:
            return sizes
        stays = self.device.placement.resident
        return [replace(size, is_staged=is_there) for size, is_there in zip(sizes, stays, strict=True)]

    def buffer_shape(self, context_tokens: int, chunk_tokens: int) -> BufferShape:
        h, rows = self.manifest.hyper, kv_rows_class(context_tokens)
        experts = ExpertCounts(h.num_experts, h.num_experts_per_tok) if h.num_experts else None
        return BufferShape(
            h.hidden_size,
            h.vocab_size,
            chunk_tokens,
            rows,
            self.num_outputs,
            experts,
            h.sliding_window,
            self.config.num_sequences,
            h.head_dim * h.num_q_heads,
        )

    def hyper_at(self, context_tokens: int) -> HyperParameters:
        """For graphs of a context of so many tokens."""
        return replace(self.manifest.hyper, rope=self.manifest.hyper.rope.at(context_tokens))

    @property
    def num_outputs(self) -> int:
        """Positions of one pass that may ask for logits: the newest of each sequence at least."""
        return max(self.config.max_outputs, self.config.num_sequences)

    def largest_shapes(self, context_tokens: int, chunk_tokens: int) -> list[ShapeClass]:
        """A chunk of one sequence, than which a token of each takes no more. Where there are several sequences, a chunk
        beside a token of another, with which all others take part in vain: more than any mixed pass has.
        """
        kv = self.kv_shape(context_tokens)
        chunk = KvGroup(chunk_tokens, kv.num_rows)
        one = ShapeClass(chunk_tokens, (chunk,), self.num_outputs, kv.type_k, kv.type_v)
        if kv.num_sequences == 1:
            return [one]
        single = KvGroup(1, kv.num_rows, kv.num_sequences, kv.num_rows)
        return [one, replace(one, num_tokens=chunk_tokens + 1, groups=(single, chunk), num_apart=1)]

    def is_aborted(self) -> bool:
        assert isinstance(self.compute.backend, CpuBackend)
        return self.compute.backend.abort.is_set

    @property
    def bounce_bytes(self) -> int:
        """Read buffers of the transfer workers: for rows on their way through repacking, and for embeddings."""
        return round_up(self.drive.bounce_bytes(repacks=self.repacks, group_bytes=self.group_bytes), PAGE_BYTES)

    @property
    def experts(self) -> tuple[ExpertClass, ...]:
        """By size: blocks whose experts have other types have larger or smaller ones."""
        banks = banks_of(self.stages)
        sizes = [expert_slot_bytes(bank, self.layouts) for bank in banks]
        return tuple(
            ExpertClass(size, sum(each == size for each in sizes) * banks[0].num_experts, banks[0].num_experts_per_tok)
            for size in sorted(set(sizes))
        )

    @property
    def group_bytes(self) -> int:
        """The largest group of rows that is repacked at once."""
        return ROWS_PER_GROUP * max((spec.type.row_bytes(spec.shape[0]) for spec in self._repacked), default=0)

    @property
    def repacks(self) -> bool:
        """Some weights change their layout while they are read."""
        return any(self._repacked)

    @property
    def _repacked(self) -> Iterator[TensorSpec]:
        return (spec for stage in self.stages for spec in stage.specs if self.layouts.repacks(spec))


def choose_layouts(
    stages: Sequence[Stage],
    repack: RepackBuffer | None,
    wanted: str,
    all_resident: bool,
    on_device: Collection[str] = (),
) -> WeightLayouts:
    """Which weights to keep repacked, of stages that compute on the CPU. `wanted` is EngineConfig.layout.

    "auto" takes what a file has repacked, Q4_0 and IQ4_NL always, the other types only when every weight stays in RAM:
    repacking Q4_K at 2 GB/s a thread would cost a streaming engine more than the faster product gives back.
    """
    if repack is None or wanted == "plain":
        return WeightLayouts(frozenset())
    names = set()
    for stage in stages:
        for spec in stage.specs:
            is_cheap = all_resident or spec.type in FAST_TO_REPACK
            is_chosen = spec.is_repacked or wanted == "repacked" or (wanted == "auto" and is_cheap)
            if is_chosen and spec.name not in on_device and repack.supports(spec.type, spec.shape[:2]):
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
    num_sequences, kv = blueprint.config.num_sequences, blueprint.kv_shape_in_ram(context_tokens)
    hyper = blueprint.manifest.hyper
    fixed = {
        KV_CACHE: kv.used_bytes(round_up(context_tokens, ROWS_PER_PAGE)),
        "transfer buffers": blueprint.bounce_bytes,
        "norms": vector_bytes(blueprint.stages),
        "graphs": graphs_bytes(len(blueprint.stages), hyper.num_experts_per_tok, num_sequences)
        + correction_bytes(blueprint.stages, blueprint.adapters, num_sequences),
        "encoding": round_up(context_tokens * ENCODING_BYTES_PER_TOKEN, PAGE_BYTES),
        "answer": round_up(context_tokens * ANSWER_BYTES_PER_TOKEN, PAGE_BYTES) * num_sequences
        # what joins the logits of several sequences from the head's pieces
        + (round_up(num_sequences * hyper.vocab_size * 4, PAGE_BYTES) if num_sequences > 1 else 0),
        **_adapter_bytes(blueprint, chunks[-1].num_tokens),
        "process": process_bytes + GROWTH_BYTES,
        **kept_bytes,
    }
    sliding = replace(kv, num_layers=kv.num_sliding)
    page = KvPage(ROWS_PER_PAGE, kv.staying.page_bytes, sliding.page_bytes, kv.kept_rows // ROWS_PER_PAGE + 2)
    return Demand(
        blueprint.unit_sizes, fixed, chunks, limit_bytes, blueprint.drive.in_flight_bytes, page, blueprint.experts
    )


def _adapter_bytes(blueprint: Blueprint, max_tokens: int) -> dict[str, int]:
    """Empty where there are none."""
    sizes = [adapter_bytes(each, max_tokens) for each in blueprint.adapters]
    return {ADAPTERS: sum(sizes)} if sizes else {}


def _chunks(blueprint: Blueprint, context_tokens: int) -> list[int]:
    """Ascending. A pass takes a token of every sequence at least, and all that fits their contexts at most."""
    least = blueprint.config.num_sequences
    most = context_tokens * blueprint.config.num_sequences
    if blueprint.device:
        most = min(most, blueprint.device.chunk_tokens)
    wanted = [blueprint.config.prefill_chunk] if blueprint.config.prefill_chunk is not None else CHUNKS
    return sorted({max(min(chunk, most), least) for chunk in wanted})


def _chunk_bytes(blueprint: Blueprint, graphs: StageGraphs, context_tokens: int, chunk_tokens: int) -> int:
    shapes = blueprint.largest_shapes(context_tokens, chunk_tokens)
    measured = graphs.measure(blueprint.stages, shapes, blueprint.adapters)
    rows = embedding_bytes(blueprint.manifest.tensors[EMBEDDING_TABLE], chunk_tokens)
    return measured + rows + round_up(blueprint.buffer_shape(context_tokens, chunk_tokens).num_bytes, PAGE_BYTES)


def vector_offsets(stages: Sequence[Stage]) -> dict[str, int]:
    """Offset of each distinct vector in their shared place."""
    offsets: dict[str, int] = {}
    end = 0
    for stage in stages:
        for spec in stage.vectors.values():
            if spec.name not in offsets:
                offsets[spec.name] = end
                end += round_up(spec.num_bytes, 128)
    return offsets


def vector_bytes(stages: Sequence[Stage]) -> int:
    sizes = {spec.name: round_up(spec.num_bytes, 128) for stage in stages for spec in stage.vectors.values()}
    return round_up(sum(sizes.values()), PAGE_BYTES)
