"""One pass of tokens through the model: schedule, bind, compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.compute.device import DevicePlace
from pipo.kvcache.cache import KvShape, kv_rows_class
from pipo.models.stage import ShapeClass, Stage, StageKind
from pipo.pipeline.adapters import ActiveAdapters, AdapterStore, Weights
from pipo.pipeline.buffers import PassBuffers, PassRows
from pipo.pipeline.embedding import Embedding
from pipo.pipeline.executor import Executor
from pipo.pipeline.expert_stages import ExpertStages
from pipo.pipeline.kv_room import KvRoom
from pipo.pipeline.sides import Model, Side
from pipo.pipeline.stats import PassStats
from pipo.pipeline.units import Unit, head_pieces
from pipo.planner.residency import Need, Step, StepKind
from pipo.planner.schedule import Schedule
from pipo.tiers.ram import Place

EMBEDDING_TABLE = "token_embd.weight"
WHOLE_PASS = -2  # in place of a stage's index: all of them at once, when every unit is in RAM for good


class DeviceSide(Protocol):
    """Stages that compute on a device, and what crosses between it and RAM in a pass."""

    def take_shape(
        self, shape: ShapeClass, stage_idxs: Sequence[int], sequence: int, adapters: ActiveAdapters
    ) -> None: ...

    def forget_places(self) -> None: ...

    def compute(self, stage_idx: int, place: Place | DevicePlace | None) -> None: ...

    def compute_all(self, place_of: Callable[[int], Place | DevicePlace | None]) -> None: ...

    def begin_pass(self, rows: PassRows) -> None:
        """Bring the inputs of a pass but the hidden state."""

    def bring_hidden(self) -> None:
        """From RAM."""

    def return_results(self) -> None:
        """The hidden state, and of a mixture what its experts are chosen by and read, to RAM."""

    def return_logits(self) -> None:
        """To RAM."""


@dataclass(frozen=True, slots=True)
class Sides:
    """`on_device` are the stages of `device`; the CPU computes the others."""

    cpu: Side[int]
    device: DeviceSide | None = None
    on_device: frozenset[int] = frozenset()


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
        moves_kv: bool = False,
        choose_threads: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        """`kv` is the shape of all blocks' cache, `kv_room` what grows of it in RAM, `experts` those of a mixture.
        `moves_kv`: that of the device's blocks lives there. `choose_threads` hears of the tokens of each pass before it
        computes.
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
        self._moves_kv = moves_kv
        self._choose_threads = choose_threads
        self._unit_of_stage = model.unit_of_stage
        on_cpu = [unit for unit in model.units if unit.stage_idx not in sides.on_device]
        self._tied = next((unit for unit in on_cpu if _is_plain_table(unit, model.stages[unit.stage_idx])), None)
        self._pieces = head_pieces(model.stages)
        self._head_rows = [(piece.start, piece.stop) for piece in self._pieces]
        needs = [self._need(i) for i in range(len(model.stages))]
        self._with_outputs = self._split(needs)
        self._without_outputs = self._split([n for n in needs if not self._is_output(n.stage_idx)])
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

    def run(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int] = (), sequence: int = 0
    ) -> npt.NDArray[np.float32]:
        """Pass tokens of one sequence at positions start, start + 1, …; `outputs` are indices into `token_ids`.

        Returns logits (outputs, vocabulary), valid until the next pass. Without outputs the head is neither read nor
        computed. The KV cache then holds these positions and no later ones; after an error it does not.
        Raises TransferError, ComputeError, Cancelled.
        """
        self._run(token_ids, PassRows([start], len(token_ids), sequence), outputs)
        return self._buffers.logits(self._head_rows, len(outputs)) if outputs else np.empty((0, 0), np.float32)

    def run_rows(
        self, token_ids: Sequence[int], start: int, outputs: Sequence[int]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """As `run` of the first sequence, but logits (vocabulary) output by output, each valid until the next is asked
        for: all at once they would be there twice where the head comes in pieces. The pass itself is over.
        """
        self._run(token_ids, PassRows([start], len(token_ids)), outputs)
        return self._buffers.logit_rows(self._head_rows, len(outputs))

    def run_batch(self, token_ids: Sequence[int], starts: Sequence[int]) -> npt.NDArray[np.float32]:
        """One token of each of the first sequences, at its start. Returns logits (sequences, vocabulary), as `run`."""
        assert len(token_ids) == len(starts) <= self.num_sequences
        self._run(token_ids, PassRows(starts, 1), range(len(starts)))
        return self._buffers.logits(self._head_rows, len(starts))

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

    def _run(self, token_ids: Sequence[int], rows: PassRows, outputs: Sequence[int]) -> None:
        num_outputs = len(outputs)
        needs = self._with_outputs if num_outputs else self._without_outputs
        for sequence, end in rows.ends:
            self._num_positions[sequence] = end
        if self._kv_room is not None:
            if rows.starts[0] == 0:
                self._kv_room.begin()
            if self._kv_room.hold(max(self._num_positions)):
                self._sides.cpu.forget_places()
        self._choose_threads(rows.num_tokens)
        self._take_shape(rows, max(num_outputs, 1), needs)
        self._buffers.prepare(rows, np.asarray(outputs, np.int32), self._kv.num_rows)
        self._embedding.gather(token_ids, self._buffers.hidden, self._table_address())
        self._is_hidden_on_device = False
        if self._sides.device is not None and needs.on_device:
            self._sides.device.begin_pass(rows)
        if self.experts is not None:
            self.experts.begin_pass(rows.num_tokens, partial(self._hand_over, False))
        self._executor.run(self._steps(needs), partial(self._compute, needs))
        if self.experts is not None:
            self.experts.end_pass()
        self._executor.stats.num_tokens += rows.num_tokens
        if num_outputs and self._sides.device is not None and self._pieces[0].stage_idx in self._sides.on_device:
            self._sides.device.return_logits()

    def _steps(self, needs: _Needs) -> list[Step]:
        is_split = (needs.on_cpu and needs.on_device) or self._moves_kv or self.experts is not None
        if not is_split and self._executor.is_settled:
            return [Step(StepKind.COMPUTE, WHOLE_PASS)]
        return self._schedule(needs.needs, self._all_units, self._executor.residency.copy())

    def _take_shape(self, rows: PassRows, num_outputs: int, needs: _Needs) -> None:
        kv, kv_rows = self._kv, kv_rows_class(rows.num_positions)
        assert kv_rows <= kv.num_rows, "the caller keeps to the context"
        shape = ShapeClass(rows.num_tokens, kv_rows, num_outputs, kv.type_k, kv.type_v)
        if len(rows.starts) > 1:
            shape = replace(shape, num_sequences=len(rows.starts), kv_stride_rows=kv.num_rows)
        adapters = self._adapters.take_rows(rows, self._weights)
        self._sides.cpu.take_shape(shape, needs.on_cpu, rows.first, adapters)
        if self._sides.device is not None:
            self._sides.device.take_shape(shape, needs.on_device, rows.first, adapters)

    def _compute(self, needs: _Needs, stage_idx: int, place: Place | DevicePlace | None) -> None:
        is_whole = stage_idx == WHOLE_PASS
        goes_to_device = bool(needs.on_device) if is_whole else stage_idx in self._sides.on_device
        self._hand_over(goes_to_device)
        side = self._sides.device if goes_to_device and self._sides.device is not None else self._sides.cpu
        if is_whole:
            side.compute_all(self._place_of)
        else:
            side.compute(stage_idx, place)

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
        moves_kv = self._moves_kv and kind is StageKind.ATTENTION and stage_idx in self._sides.on_device
        return Need(stage_idx, unit.unit_id if unit else None, moves_kv, is_routed=kind is StageKind.EXPERTS)

    def _is_output(self, stage_idx: int) -> bool:
        return self._model.stages[stage_idx].kind in (StageKind.FINAL_NORM, StageKind.HEAD)


def _is_plain_table(unit: Unit, stage: Stage) -> bool:
    is_plain = any(read.rows is None for read in unit.layout.reads) and EMBEDDING_TABLE in unit.layout.offsets
    return is_plain and not any(spec.is_repacked for spec in stage.matrices.values())
