"""One pass of tokens through the model: schedule, bind, compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipo.base.manifest import EMBEDDING_TABLE
from pipo.base.units import round_up
from pipo.compute.device import DevicePlace
from pipo.kvcache.cache import ROWS_PER_PAGE, KvShape, kv_rows_class
from pipo.models.stage import Stage, StageKind
from pipo.pipeline.adapters import AdapterStore, Weights
from pipo.pipeline.buffers import PassBuffers
from pipo.pipeline.embedding import Embedding
from pipo.pipeline.executor import Executor
from pipo.pipeline.expert_stages import ExpertStages
from pipo.pipeline.kv_room import KvRoom
from pipo.pipeline.sides import Model, Sides
from pipo.pipeline.spans import MAX_GROUPS, PassRows, Span, passes_of
from pipo.pipeline.stats import PassStats
from pipo.pipeline.units import Unit, head_pieces
from pipo.planner.residency import Need, Step, StepKind, in_micro_batches
from pipo.planner.schedule import Schedule
from pipo.tiers.ram import Place

DEVICE_ALIGNMENT = 256  # the most that Vulkan lets a device ask for
WHOLE_PASS = -2  # in place of a stage's index: all of them at once, when every unit is in RAM for good


@dataclass(frozen=True, slots=True)
class _Needs:
    """The stages of one kind of pass, with outputs or without, and which of them each side computes."""

    needs: Sequence[Need]
    on_cpu: Sequence[int]
    on_device: Sequence[int]


class Forward:
    """Runs passes over the KV cache of one or more sequences. Threads: one at a time."""

    def __init__(
        self,
        model: Model,
        sides: Sides,
        executor: Executor,
        embedding: Embedding,
        buffers: PassBuffers,
        kv: KvShape,
        schedule: Schedule,
        adapters: AdapterStore,
        kv_room: KvRoom | None = None,
        experts: ExpertStages | None = None,
        *,
        moving_kv_sequences: int = 0,
        choose_threads: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        """`kv` is the shape of all blocks' cache, `kv_room` what grows of it in RAM, `experts` those of a mixture.
        `moving_kv_sequences`: that of the device's blocks lives there, and goes to the device for so many sequences at
        a time. `choose_threads` hears of the tokens of each pass before it computes.
        """
        self._model = model
        self._sides = sides
        self._executor = executor
        self._embedding = embedding
        self._buffers = buffers
        self._kv = kv
        self._schedule = schedule
        self._adapters = adapters
        self._kv_room = kv_room
        self._sliding_window = buffers.shape.sliding_window
        self.experts = experts
        self._moving_kv_sequences = moving_kv_sequences
        self._choose_threads = choose_threads
        self._unit_of_stage = model.unit_of_stage
        on_cpu = [unit for unit in model.units if unit.stage_idx not in sides.on_device]
        self._tied = next((unit for unit in on_cpu if _is_plain_table(unit, model.stages[unit.stage_idx])), None)
        self._pieces = head_pieces(model.stages)
        self._head_rows = [(piece.start, piece.stop) for piece in self._pieces]
        needs = [self._need(i) for i in range(len(model.stages))]
        self._with_outputs = self._split(needs)
        self._without_outputs = self._split([n for n in needs if not self._is_output(n.stage_idx)])
        kinds = [stage.kind for stage in model.stages]
        self._norm_idx = kinds.index(StageKind.FINAL_NORM)
        self._with_norm = self._split([n for n in needs if kinds[n.stage_idx] is not StageKind.HEAD])
        self._has_head_on_device = self._pieces[0].stage_idx in sides.on_device
        self._all_units = [need.unit_id for need in needs if need.unit_id is not None]
        self._is_hidden_on_device = False
        self._num_positions = [0] * kv.num_sequences  # of each sequence
        self._weights: list[Weights] = [{}] * kv.num_sequences  # of adapters, of each sequence

    def take_stats(self) -> PassStats:
        """The counters since they were last taken."""
        stats, self._executor.stats = self._executor.stats, PassStats()
        if self.experts is not None:
            stats.experts = self.experts.take_stats()
        return stats

    @property
    def max_tokens(self) -> int:
        return self._buffers.shape.max_tokens

    @property
    def max_outputs(self) -> int:
        return self._buffers.shape.max_outputs

    @property
    def num_sequences(self) -> int:
        """That have keys and values at a time."""
        return self._kv.num_sequences

    def run_spans(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        """Tokens of any sequences in one sweep over the weights, at most `max_tokens`, of each sequence one span.

        Returns logits (spans that want them, vocabulary), in the order of the spans, valid until the next pass. Every
        sequence then holds the positions up to its span's end and no later ones; after an error those before its start.
        Where a pass cannot hold them all (`can_mix`, MAX_GROUPS) it takes several.
        Raises as `run`.
        """
        assert len({span.sequence for span in spans}) == len(spans), "a sequence has one span in a pass"
        passes = passes_of(spans, self._max_groups)
        if len(passes) == 1:
            return self._run_together(spans)
        found: dict[int, npt.NDArray[np.float32]] = {}
        for each in passes:
            wanting = [span.sequence for span in each if span.wants_logits]
            found |= zip(wanting, self._run_together(each).copy(), strict=True)
        return _stacked([found[span.sequence] for span in spans if span.wants_logits])

    def _run_together(self, spans: Sequence[Span]) -> npt.NDArray[np.float32]:
        rows = PassRows.of(spans, self._max_groups)
        last = rows.last_rows()
        outputs = [last[span.sequence] for span in spans if span.wants_logits]
        self._run(rows, outputs)
        return self._logits(len(outputs))

    def run(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int] = (), sequence: int = 0
    ) -> npt.NDArray[np.float32]:
        """Pass tokens of one sequence at positions start, start + 1, …; `outputs` are indices into `token_ids`.

        Returns logits (outputs, vocabulary), valid until the next pass. Without outputs the head is neither read nor
        computed. The KV cache then holds these positions and no later ones; after an error it does not.
        Raises TransferError, ComputeError, Cancelled.
        """
        self._run(PassRows.of([Span(sequence, start, token_ids, bool(outputs))]), outputs)
        return self._logits(len(outputs))

    def run_rows(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int], sequence: int = 0
    ) -> Iterator[npt.NDArray[np.float32]]:
        """As `run`, but logits (vocabulary) output by output, each valid until the next is asked
        for: all at once they would be there twice where the head comes in pieces. The pass itself is over.
        """
        self._run(PassRows.of([Span(sequence, start, token_ids, bool(outputs))]), outputs)
        return self._buffers.logit_rows(self._head_rows, len(outputs))

    def run_batch(self, token_ids: Sequence[int], starts: Sequence[int]) -> npt.NDArray[np.float32]:
        """One token of each of the first sequences, at its start. Returns logits (sequences, vocabulary), as `run`."""
        pairs = zip(token_ids, starts, strict=True)
        return self.run_spans([Span(i, start, [token], True) for i, (token, start) in enumerate(pairs)])

    def embed(self, token_ids: Sequence[int], sequence: int = 0) -> npt.NDArray[np.float32]:
        """The normed hidden state (hidden_size,) of the last of these tokens, which become the sequence's positions
        from 0 on. The head is neither read nor computed. Raises as `run`.
        """
        for start in range(0, len(token_ids), self.max_tokens):
            span = Span(sequence, start, token_ids[start : start + self.max_tokens], wants_logits=False)
            is_last = span.end == len(token_ids)
            outputs = [span.num_tokens - 1] if is_last else []
            self._run(PassRows.of([span]), outputs, self._with_norm if is_last else None)
        if self._sides.device is not None and self._norm_idx in self._sides.on_device:
            self._sides.device.return_normed()
        normed: npt.NDArray[np.float32] = self._buffers.normed[0].copy()
        return normed

    def release(self, sequence: int) -> None:
        """Its keys and values are of no use: their memory is free for others, at once where it is RAM."""
        self._num_positions[sequence] = 0
        if self._kv_room is not None:
            self._kv_room.release(sequence)

    @property
    def can_mix(self) -> bool:
        """A pass takes tokens of any sequences together; else `run_spans` sweeps the weights more than once: on a
        device where a token's row of queries, keys or values may begin where kernels cannot read.
        """
        sizes = self._buffers.shape.mixed_size, self._kv.kv_size
        return self._sides.device is None or not any(size * 4 % DEVICE_ALIGNMENT for size in sizes)

    @property
    def _max_groups(self) -> int:
        return MAX_GROUPS if self.can_mix else 1

    @property
    def can_copy_rows(self) -> bool:
        """All keys and values live in RAM, and none is under way to or from a device."""
        in_ram = self._kv_room.num_layers if self._kv_room is not None else 0
        return in_ram == self._kv.num_layers and not self._moving_kv_sequences

    def copy_rows(self, source: int, target: int, num_positions: int) -> None:
        """Keys and values of the first positions of one sequence become those of another, which forgets its own; only
        where `can_copy_rows`. Raises Cancelled, where nothing is copied.
        """
        assert self.can_copy_rows and self._kv_room is not None and source != target
        assert num_positions <= self._num_positions[source], "what a sequence has"
        self._num_positions[target] = num_positions
        self._hold_kv(self._kv_room)
        self._kv_room.copy_rows(source, target, num_positions)

    @property
    def kv_used_bytes(self) -> int:
        """Of the pages that hold the positions of all sequences, wherever they are."""
        return self._kv.used_bytes_of([round_up(num, ROWS_PER_PAGE) for num in self._num_positions])

    def use_adapters(self, weights: Sequence[Weights]) -> None:
        """How much of which adapters the first sequences have in passes to come; the others have none. Keys and values
        computed with others are of no use any more.
        """
        self._weights = [*weights, *[{}] * (self.num_sequences - len(weights))]

    def forget_bindings(self) -> None:
        """Graphs or what they are bound to have gone."""
        self._sides.cpu.forget_places()
        if self._sides.device is not None:
            self._sides.device.forget_places()

    def can_resume(self, position: int) -> bool:
        """What a token there sees of the first sequence's earlier ones is in the KV cache, if it was computed."""
        return self._kv_room is None or self._kv_room.has_window(position, self._sliding_window)

    def forget(self) -> None:
        """The keys and values of all sequences: the memory they grew into is free for others."""
        self._num_positions = [0] * self.num_sequences

    def _run(self, rows: PassRows, outputs: Sequence[int], needs: _Needs | None = None) -> None:
        num_outputs = len(outputs)
        needs = needs or (self._with_outputs if num_outputs else self._without_outputs)
        self._take_rows(rows)
        self._choose_threads(rows.num_tokens)
        is_plain = self._take_shape(rows, max(num_outputs, 1), needs)
        num_micro_batches = self._take_micro_batches(rows)
        self._buffers.prepare(rows, np.asarray(outputs, np.int32), self._kv.num_rows)
        self._embedding.gather(rows.token_ids, self._buffers.hidden, self._table_address())
        self._is_hidden_on_device = False
        if self._sides.device is not None and needs.on_device:
            self._sides.device.begin_pass(rows)
        if self.experts is not None:
            self.experts.begin_pass(rows.num_tokens, partial(self._hand_over, False))
        self._executor.run(self._steps(needs, num_micro_batches, is_plain), partial(self._compute, needs))
        if self.experts is not None:
            self.experts.end_pass()
        self._executor.stats.num_tokens += rows.num_tokens
        if self._sides.device is not None and needs is self._with_outputs and self._has_head_on_device:
            self._sides.device.return_logits()

    def _take_rows(self, rows: PassRows) -> None:
        """Memory for the positions that the pass will have stored."""
        for span in rows.spans:
            self._num_positions[span.sequence] = span.end
        if self._kv_room is not None:
            if rows.groups[0].spans[0].start == 0:
                self._kv_room.begin()
            self._hold_kv(self._kv_room)

    def _hold_kv(self, room: KvRoom) -> None:
        if room.hold(self._num_positions):
            self._sides.cpu.forget_places()

    def _logits(self, num_outputs: int) -> npt.NDArray[np.float32]:
        return self._buffers.logits(self._head_rows, num_outputs) if num_outputs else np.empty((0, 0), np.float32)

    def _steps(self, needs: _Needs, num_micro_batches: int, is_plain: bool) -> list[Step]:
        is_split = (needs.on_cpu and needs.on_device) or self._moving_kv_sequences or self.experts is not None
        if not is_split and is_plain and self._executor.is_settled:
            return [Step(StepKind.COMPUTE, WHOLE_PASS)]
        wanted = in_micro_batches(needs.needs, num_micro_batches)
        return self._schedule(wanted, self._all_units, self._executor.residency.copy())

    def _take_micro_batches(self, rows: PassRows) -> int:
        """What of the pass has its keys and values on a device at a time. Returns how many there are."""
        if self._sides.device is None or not self._moving_kv_sequences:
            return 1
        parts = rows.parts(self._moving_kv_sequences, self._max_groups)
        self._sides.device.take_micro_batches(parts)
        return len(parts)

    def _take_shape(self, rows: PassRows, num_outputs: int, needs: _Needs) -> bool:
        """Whether one graph may do the whole pass: mixed ones are too many to keep for all stages."""
        assert kv_rows_class(rows.num_positions) <= self._kv.num_rows, "the caller keeps to the context"
        shape = rows.shape(self._kv, num_outputs)
        adapters = self._adapters.take_rows(rows, self._weights)
        self._sides.cpu.take_shape(shape, needs.on_cpu, rows.firsts, adapters)
        if self._sides.device is not None:
            self._sides.device.take_shape(shape, needs.on_device, rows.firsts, adapters)
        return shape.is_plain

    def _compute(self, needs: _Needs, step: Step, place: Place | DevicePlace | None) -> None:
        stage_idx, device = step.stage_idx, self._sides.device
        is_whole = stage_idx == WHOLE_PASS
        goes_to_device = bool(needs.on_device) if is_whole else stage_idx in self._sides.on_device
        self._hand_over(goes_to_device)
        if is_whole:
            side = device if goes_to_device and device is not None else self._sides.cpu
            side.compute_all(self._place_of)
        elif goes_to_device and device is not None:
            device.compute(stage_idx, step.micro_batch, place)
        else:
            self._sides.cpu.compute(stage_idx, place)

    def _hand_over(self, to_device: bool) -> None:
        """The hidden state follows the stages."""
        if self._sides.device is None or to_device is self._is_hidden_on_device:
            return
        if to_device:
            self._sides.device.bring_hidden()
        else:
            self._sides.device.return_results()
        self._is_hidden_on_device = to_device

    def _place_of(self, stage_idx: int) -> Place | DevicePlace | None:
        unit = self._unit_of_stage.get(stage_idx)
        return None if unit is None else self._executor.place_of(unit.unit_id)

    def _table_address(self) -> int | None:
        """The embedding table, where the whole model is in RAM and has the table, in plain layout, as its head."""
        if self._tied is None or not self._executor.is_settled:
            return None
        place = self._executor.place_of(self._tied.unit_id)
        assert isinstance(place, Place)
        return place.address + self._tied.layout.offsets[EMBEDDING_TABLE]

    def _split(self, needs: Sequence[Need]) -> _Needs:
        on_device = self._sides.on_device
        return _Needs(
            needs,
            [need.stage_idx for need in needs if need.stage_idx not in on_device],
            [need.stage_idx for need in needs if need.stage_idx in on_device],
        )

    def _need(self, stage_idx: int) -> Need:
        unit = self._unit_of_stage.get(stage_idx)
        kind = self._model.stages[stage_idx].kind
        moves_kv = self._moving_kv_sequences > 0 and kind is StageKind.ATTENTION and stage_idx in self._sides.on_device
        return Need(stage_idx, unit.unit_id if unit else None, int(moves_kv), is_routed=kind is StageKind.EXPERTS)

    def _is_output(self, stage_idx: int) -> bool:
        return self._model.stages[stage_idx].kind in (StageKind.FINAL_NORM, StageKind.HEAD)


def _stacked(rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)


def _is_plain_table(unit: Unit, stage: Stage) -> bool:
    is_plain = any(read.rows is None for read in unit.layout.reads) and EMBEDDING_TABLE in unit.layout.offsets
    return is_plain and not any(spec.is_repacked for spec in stage.matrices.values())
