"""A machine as it is, but for one part that is faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipo.base.machine import ComputeProfile, LayoutRates, LinkProfile, MachineProfile, ProductRate


def with_drive(machine: MachineProfile, factor: float) -> MachineProfile:
    """The drive delivers `factor` times the bytes a second. Repacking on the way in keeps its own limit."""
    return replace(machine, drive=_faster_link(machine.drive, factor))


def with_link(machine: MachineProfile, factor: float) -> MachineProfile:
    """So does the link to the first device, both ways."""
    device = machine.devices[1]
    assert device.from_host is not None and device.to_host is not None
    links = _faster_link(device.from_host, factor), _faster_link(device.to_host, factor)
    return _with_device(machine, 1, replace(device, from_host=links[0], to_host=links[1]))


def with_compute(machine: MachineProfile, device_idx: int, factor: float) -> MachineProfile:
    """That device computes `factor` times as fast; what starting a stage or a graph takes stays."""
    return _with_device(machine, device_idx, _faster_compute(machine.devices[device_idx], factor))


def _with_device(machine: MachineProfile, idx: int, device: ComputeProfile) -> MachineProfile:
    return replace(machine, devices=(*machine.devices[:idx], device, *machine.devices[idx + 1 :]))


def _faster_link(link: LinkProfile, factor: float) -> LinkProfile:
    return replace(link, bytes_per_s=link.bytes_per_s * factor)


def _faster_compute(device: ComputeProfile, factor: float) -> ComputeProfile:
    products: Mapping[str, LayoutRates] = {
        name: replace(
            rates,
            plain=_faster_rate(rates.plain, factor),
            repacked=None if rates.repacked is None else _faster_rate(rates.repacked, factor),
        )
        for name, rates in device.products.items()
    }
    return replace(
        device,
        products=products,
        attention={name: _faster_rate(rate, factor) for name, rate in device.attention.items()},
        activation_s_per_element=device.activation_s_per_element / factor,
    )


def _faster_rate(rate: ProductRate, factor: float) -> ProductRate:
    return ProductRate(tuple((rows, seconds / factor) for rows, seconds in rate.points))
