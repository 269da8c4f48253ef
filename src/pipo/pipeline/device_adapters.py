"""Copies of adapters on a device: the tensors of stages that compute there, and the scales of a pass's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipo.base.adapter import ADAPTERS, Adapter, AdapterId
from pipo.base.manifest import TensorSpec
from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice, DevicePlace
from pipo.models.stage import Stage
from pipo.pipeline.adapters import LoadedAdapter, tensor_key
from pipo.pipeline.buffers import BufferShape
from pipo.pipeline.device_layout import DeviceSizes
from pipo.pipeline.device_tier import DeviceArena
from pipo.tiers.ledger import Ledger


def device_adapter_bytes(
    adapters: Sequence[Adapter], stages: Sequence[Stage], device: DeviceSizes, buffers: BufferShape
) -> int:
    """What adapters take there if all these stages compute there."""
    scales = _scale_bytes(buffers, device)
    return sum(sum(_sizes(each, stages, device)) + len(each.factors) * scales for each in adapters)


def _scale_bytes(buffers: BufferShape, device: DeviceSizes) -> int:
    """Of one factor: a row for each token, and where there may be micro-batches those of each where they may begin."""
    num_bytes, num = round_up(buffers.max_tokens * 4, device.alignment), buffers.num_sequences
    return 2 * num_bytes + num * device.alignment if num > 1 else num_bytes


def _sizes(adapter: Adapter, stages: Sequence[Stage], device: DeviceSizes) -> list[int]:
    specs = _specs(adapter, stages)
    return [round_up(device.tensor_bytes(spec.type, spec.shape), device.alignment) for spec in specs]


def _specs(adapter: Adapter, stages: Sequence[Stage]) -> Iterator[TensorSpec]:
    for stage in stages:
        for matrix in stage.matrices.values():
            part = adapter.parts.get(matrix.name)
            if part is not None:
                yield from (part.a, part.b)


class DeviceAdapters:
    """`places` by the keys of an AdapterStore. `stages` are those that compute there."""

    def __init__(self, device: ComputeDevice, ledger: Ledger, stages: Sequence[Stage], buffers: BufferShape) -> None:
        self.places: dict[str, DevicePlace] = {}
        self._device = device
        self._ledger = ledger
        self._stages = stages
        self._scale_bytes = _scale_bytes(buffers, device)
        self._arenas: dict[AdapterId, DeviceArena] = {}
        self._keys: dict[AdapterId, list[str]] = {}

    def load(self, loaded: LoadedAdapter) -> None:
        """Copy it there. Raises OverBudget, OutOfDeviceMemory; then nothing has changed."""
        named, arena = loaded.named, DeviceArena(self._device, self._ledger)
        specs = list(_specs(named.adapter, self._stages))
        sizes = _sizes(named.adapter, self._stages, self._device)
        sizes += [self._scale_bytes] * len(loaded.scales)
        try:
            places = arena.take(ADAPTERS, sizes)
        except BaseException:
            arena.close()
            raise
        keys = [tensor_key(named.id, spec.name) for spec in specs] + loaded.scale_keys
        for spec, key, place in zip(specs, keys, places, strict=False):  # scales come with each pass
            place.buffer.upload(place.offset, loaded.addresses[key], spec.num_bytes)
        self.places |= zip(keys, places, strict=True)
        self._arenas[named.id], self._keys[named.id] = arena, keys

    def unload(self, adapter_id: AdapterId) -> None:
        for key in self._keys.pop(adapter_id):
            del self.places[key]
        self._arenas.pop(adapter_id).close()

    def close(self) -> None:
        for adapter_id in list(self._arenas):
            self.unload(adapter_id)
