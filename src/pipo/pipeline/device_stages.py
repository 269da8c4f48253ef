"""Stages that compute on a device, and what crosses between it and RAM in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipo.base.units import round_up
from pipo.compute.device import DeviceBuffer, DevicePlace
from pipo.models.stage import ShapeClass
from pipo.pipeline.adapters import NO_ADAPTERS, ActiveAdapters
from pipo.pipeline.buffers import ATTENTION_INPUTS, ROUTING, PassBuffers
from pipo.pipeline.device_tier import DeviceMemory, MovingKv
from pipo.pipeline.sides import Model, Side
from pipo.pipeline.spans import PassRows
from pipo.pipeline.stage_graphs import StageGraphs
from pipo.tiers.ram import Place

_NO_OUTPUTS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """Computes the attention of one of `num`, whose arrays begin at these offsets, by name or key of scales."""

    num: int
    first_sequence: int
    offsets: Mapping[str, int]
    side: Side[DevicePlace]


class DeviceStages:
    """Computes the device's stages, and carries a pass's inputs and results between RAM and the device.

    Those copies are small and block. Threads: one at a time.
    """

    def __init__(
        self, model: Model, graphs: StageGraphs, memory: DeviceMemory, buffers: PassBuffers, moving_kv: MovingKv | None
    ) -> None:
        self._model = model
        self._graphs = graphs
        self._memory = memory
        self._side = self._side_of(memory)
        self._buffers = buffers
        self._moving_kv = moving_kv
        self._moving_stages = tuple(moving_kv.block_of_stage) if moving_kv is not None else ()
        self._micro_batches: list[_MicroBatch] = []
        self._adapters = NO_ADAPTERS

    def _side_of(self, memory: DeviceMemory) -> Side[DevicePlace]:
        return Side(self._model, self._graphs, memory)

    def take_shape(
        self, shape: ShapeClass, stage_idxs: Sequence[int], firsts: tuple[int, ...], adapters: ActiveAdapters
    ) -> None:
        self._adapters = adapters
        self._side.take_shape(shape, stage_idxs, firsts, adapters)

    def take_micro_batches(self, parts: Sequence[PassRows]) -> None:
        """Of the pass whose shape was taken, where keys and values move. Where there are several, what the attention of
        each reads is prepared and brought here; the pass as a whole is to be prepared after that.
        """
        assert self._moving_kv is not None
        self._moving_kv.begin_pass(parts)
        known, self._micro_batches = self._micro_batches, []
        token, ends = 0, self._ends_of_scales() if len(parts) > 1 else {}
        for i, part in enumerate(parts):
            offsets = {name: token * size for name, size in self._buffers.shape.row_bytes.items()} | ends
            found = known[i] if i < len(known) else None
            if found is None or (found.num, found.first_sequence, found.offsets) != (len(parts), part.first, offsets):
                places = self._moving_kv.places(i)
                memory = replace(self._memory, kv=places, first_sequence=part.first, offsets=offsets)
                found = _MicroBatch(len(parts), part.first, offsets, self._side_of(memory))
            found.side.take_shape(
                part.shape(self._memory.kv_shape, 1), self._moving_stages, part.firsts, self._adapters
            )
            self._micro_batches.append(found)
            if len(parts) > 1:
                ends = self._bring(part, token, ends)
                token += part.num_tokens

    def _bring(self, part: PassRows, token: int, begins: Mapping[str, int]) -> dict[str, int]:
        """What the attention of a micro-batch reads, from its first token on, to where it begins. Returns the ends."""
        self._buffers.prepare(part, _NO_OUTPUTS, self._memory.kv_shape.num_rows)
        ends = {}
        for name in ATTENTION_INPUTS & self._memory.arrays.keys():
            self._move(name, DeviceBuffer.upload, begins.get(name, 0))
            ends[name] = begins.get(name, 0) + self._buffers.used_bytes[name]
        for key, address in self._scales():
            place = self._memory.adapter(key)
            place.buffer.upload(place.offset + begins[key], address + token * 4, part.num_tokens * 4)
            ends[key] = begins[key] + part.num_tokens * 4
        return {name: round_up(end, self._memory.alignment) for name, end in ends.items()}

    def _ends_of_scales(self) -> dict[str, int]:
        """Those of the whole pass are there too: the other stages read them."""
        end = round_up(self._buffers.shape.max_tokens * 4, self._memory.alignment)
        return {key: end for key, _ in self._scales()}

    def _scales(self) -> Iterator[tuple[str, int]]:
        """Of the adapters, by key, and where they are in RAM."""
        return ((key, loaded.addresses[key]) for loaded in self._adapters.loaded for key in loaded.scale_keys)

    def forget_places(self) -> None:
        self._side.forget_places()
        self._micro_batches.clear()

    def compute(self, stage_idx: int, micro_batch: int, place: Place | DevicePlace | None) -> None:
        moves = stage_idx in self._moving_stages
        side = self._micro_batches[micro_batch].side if moves else self._side
        side.compute(stage_idx, place)

    def compute_all(self, place_of: Callable[[int], Place | DevicePlace | None]) -> None:
        self._side.compute_all(place_of)

    def begin_pass(self, rows: PassRows) -> None:
        self._move("out_rows", DeviceBuffer.upload)
        if len(self._micro_batches) < 2:  # what attention reads is there already
            for name in ATTENTION_INPUTS & self._memory.arrays.keys():
                self._move(name, DeviceBuffer.upload)
        for key, address in self._scales():
            place = self._memory.adapter(key)
            place.buffer.upload(place.offset, address, rows.num_tokens * 4)

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

    def _move(self, name: str, move: Callable[[DeviceBuffer, int, int, int], None], beyond: int = 0) -> None:
        """`beyond` its place, so many bytes."""
        place, num_bytes = self._memory.array(name), self._buffers.used_bytes[name]
        if num_bytes:
            move(place.buffer, place.offset + beyond, self._buffers.addresses[name], num_bytes)
