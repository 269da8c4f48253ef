"""How units and vectors lie on a device: tensor by tensor, each where the device wants it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipo.base.manifest import TensorSpec
from pipo.base.units import round_up
from pipo.compute.device import ComputeDevice
from pipo.models.stage import Stage


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """`offsets` by tensor name, `num_bytes` in all. A file packs tensors closer than devices read them."""

    num_bytes: int
    offsets: Mapping[str, int]


def layout_on_device(specs: Iterable[TensorSpec], device: ComputeDevice) -> DeviceLayout:
    """Each tensor once, in the order given, on the device's alignment and with the padding that it reads."""
    offsets: dict[str, int] = {}
    end = 0
    for spec in specs:
        if spec.name not in offsets:
            offsets[spec.name] = end
            end = round_up(end + device.tensor_bytes(spec.type, spec.shape), device.alignment)
    return DeviceLayout(end, offsets)


def unit_on_device(stage: Stage, device: ComputeDevice) -> DeviceLayout:
    return layout_on_device(stage.matrices.values(), device)


def vectors_on_device(stages: Sequence[Stage], device: ComputeDevice) -> DeviceLayout:
    return layout_on_device((spec for stage in stages for spec in stage.vectors.values()), device)
