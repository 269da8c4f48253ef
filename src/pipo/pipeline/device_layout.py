"""How units and vectors lie on a device: tensor by tensor, each where the device wants it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipo.base.manifest import TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.base.units import round_up
from pipo.models.stage import Stage


class DeviceSizes(Protocol):
    """How a device wants tensors to lie, and how much of it is free."""

    @property
    def name(self) -> str: ...

    @property
    def alignment(self) -> int: ...

    @property
    def free_bytes(self) -> int: ...

    def tensor_bytes(self, type_: TensorType, shape: tuple[int, ...]) -> int:
        """What a tensor takes there."""


@dataclass(frozen=True, slots=True)
class AbsentDevice:
    """A device of another machine, of which name and memory are known. Plans are made for it; nothing runs there."""

    name: str
    free_bytes: int
    alignment: int = 256  # the most that Vulkan drivers ask for; CUDA's 128 is less

    def tensor_bytes(self, type_: TensorType, shape: tuple[int, ...]) -> int:
        """Without the padding that some devices read beyond a row."""
        return type_.nbytes(shape)


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """`offsets` by tensor name, `num_bytes` in all. A file packs tensors closer than devices read them."""

    num_bytes: int
    offsets: Mapping[str, int]


def layout_on_device(specs: Iterable[TensorSpec], device: DeviceSizes) -> DeviceLayout:
    """Each tensor once, in the order given, on the device's alignment and with the padding that it reads."""
    offsets: dict[str, int] = {}
    end = 0
    for spec in specs:
        if spec.name not in offsets:
            offsets[spec.name] = end
            end = round_up(end + device.tensor_bytes(spec.type, spec.shape), device.alignment)
    return DeviceLayout(end, offsets)


def unit_on_device(stage: Stage, device: DeviceSizes) -> DeviceLayout:
    return layout_on_device(stage.matrices.values(), device)


def vectors_on_device(stages: Sequence[Stage], device: DeviceSizes) -> DeviceLayout:
    return layout_on_device((spec for stage in stages for spec in stage.vectors.values()), device)
