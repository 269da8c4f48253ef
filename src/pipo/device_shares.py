"""What of a model a device beside the CPU may compute and keep: the choices a plan has."""

from __future__ import annotations

from collections.abc import Sequence

from pipo.base.adapter import Adapter
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, UsageError
from pipo.base.units import MIB, format_size
from pipo.compute.device import ComputeDevice, choose_device
from pipo.compute.ggml import Library
from pipo.hardware.host import Host
from pipo.model_file import ModelFile
from pipo.pipeline.blueprint import CHUNKS, NARROW_DRIVE, Blueprint, choose_layouts
from pipo.pipeline.device_layout import AbsentDevice
from pipo.pipeline.device_share import DeviceShare, PassSizes, device_demand
from pipo.pipeline.stage_graphs import Compute
from pipo.planner.device_placement import DeviceDemand, place_on_device, smallest_vram_bytes

CHUNK_SHARE = 8  # what a prefill chunk computes in on a device may take this fraction of its limit
FEW = 8  # of the shares worth a look, how many are predicted, evenly apart


def device_of(lib: Library, config: EngineConfig) -> ComputeDevice | None:
    """What computes beside the CPU. Raises UsageError where that is not there."""
    device = choose_device(lib, config.device)
    if device is None and config.vram != "auto" and config.device.lower() != "cpu":
        raise UsageError(
            f"--vram {config.vram}: libggml sees no device besides the CPU", hint="leave it out, or --device cpu"
        )
    return device


class DeviceShares:
    """By context; found once for each. Without a device there are none."""

    def __init__(
        self,
        model: ModelFile,
        config: EngineConfig,
        compute: Compute,
        device: ComputeDevice | AbsentDevice | None,
        host: Host,
        adapters: Sequence[Adapter],
    ) -> None:
        self._adapters = adapters
        self._model = model
        self._config = config
        self._compute = compute
        self._device = device
        self._host = host
        self._known: dict[int, list[DeviceShare]] = {}

    def first(self, context_tokens: int) -> DeviceShare | None:
        """That copies least; None where there is no device, or where "auto" found one too small. Raises OverBudget."""
        return min(self._all(context_tokens), key=_preference, default=None)

    def few(self, context_tokens: int) -> Sequence[DeviceShare]:
        """Evenly apart, the first and the last among them; as many more of those whose keys and values move for a part
        of the sequences at a time. Raises OverBudget.
        """
        shares = self._all(context_tokens)
        at_once = (0, self._config.num_sequences)
        whole, parts = (
            [s for s in shares if (s.placement.kv_sequences in at_once) is is_whole] for is_whole in (True, False)
        )
        return [*_evenly(whole), *_evenly(parts)]

    def _all(self, context_tokens: int) -> list[DeviceShare]:
        """Raises OverBudget where there is none and one was asked for."""
        if context_tokens not in self._known:
            self._known[context_tokens] = self._find(context_tokens)
        return self._known[context_tokens]

    def _find(self, context_tokens: int) -> list[DeviceShare]:
        device = self._device
        if device is None:
            return []
        limit = self._host.vram_bytes(device.free_bytes)
        chunk = self._chunk(device, context_tokens, limit)
        wanted = self._demand(device, context_tokens, chunk, limit)
        found = [each for each in place_on_device(wanted) if each.is_all or self._config.compute == "auto"]
        if not found and (self._config.device != "auto" or self._config.compute != "auto"):
            raise _over_vram(device, wanted)
        return [DeviceShare(device, each, self._model.stages, limit, chunk) for each in found]

    def _chunk(self, device: ComputeDevice | AbsentDevice, context_tokens: int, limit: int) -> int:
        """The largest prefill chunk whose arrays and intermediates take a small share of the device."""
        least = self._config.num_sequences
        for chunk in sorted(CHUNKS, reverse=True):
            fixed = self._demand(device, context_tokens, max(chunk, least), limit).fixed
            if fixed["activations"] * CHUNK_SHARE <= limit:
                return max(chunk, least)
        return max(CHUNKS[0], least)

    def _demand(
        self, device: ComputeDevice | AbsentDevice, context_tokens: int, chunk: int, limit: int
    ) -> DeviceDemand:
        model, config = self._model, self._config
        layouts = choose_layouts(model.stages, self._compute.repack, config.layout, all_resident=False)
        blueprint = Blueprint(model.manifest, model.stages, layouts, self._compute, config, NARROW_DRIVE)
        chunk = max(min(chunk, context_tokens), config.num_sequences)
        sizes = PassSizes(
            blueprint.largest_shapes(context_tokens, chunk),
            blueprint.buffer_shape(context_tokens, chunk),
            blueprint.kv_shape(context_tokens),
        )
        return device_demand(model.stages, model.manifest.hyper, device, self._compute, sizes, limit, self._adapters)


def _evenly(shares: Sequence[DeviceShare]) -> Sequence[DeviceShare]:
    if len(shares) <= FEW:
        return shares
    step = (len(shares) - 1) / (FEW - 1)
    return [shares[round(i * step)] for i in range(FEW)]


def _preference(share: DeviceShare) -> tuple[int, bool]:
    """Least is copied per pass, and keys and values stay."""
    return share.placement.streamed_bytes, share.placement.moves_kv


def _over_vram(device: ComputeDevice | AbsentDevice, wanted: DeviceDemand) -> OverBudget:
    least = smallest_vram_bytes(wanted)
    return OverBudget(
        f"{device.name} would need {format_size(least)} at least, the limit is {format_size(wanted.limit_bytes)}",
        smallest_bytes=least,
        hint=f"--vram {-(-least // MIB)}MiB where the device has it, or --device cpu",
    )
