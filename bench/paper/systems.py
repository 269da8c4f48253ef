"""What differs between the systems compared besides their schedule: kernels, and how their bytes travel."""

from __future__ import annotations

from dataclasses import dataclass

from bench.paper.figures import Figures
from bench.paper.machines import dequantising, machine
from bench.paper.policy import weight_bytes
from bench.paper.shapes import Shape
from pipo.base.machine import MachineProfile

LAPTOP = "rtx3060-laptop"
T4 = "t4-208gb"


@dataclass(frozen=True, slots=True)
class System:
    """A machine with a system's kernels, and the rates of its transfers in bytes/s. `write` is to the drive."""

    machine: MachineProfile
    read: float
    write: float
    copy: float
    kv_load: float
    kv_save: float


def pipo_on_laptop(shape: Shape, figures: Figures) -> System:
    """Plain reads, pinned staging, products from 4 bits."""
    return _pinned(machine(LAPTOP, figures), _plain_read(shape, figures))


def flexgen_on_laptop(shape: Shape, figures: Figures) -> System:
    """A file that lies in the page cache is mapped at a share of what reading it gives; so is one on the drive."""
    profile = machine(LAPTOP, figures)
    is_cached = _is_cached(shape, profile, figures)
    plain = figures.of("paper.page_cache") if is_cached else profile.drive.bytes_per_s
    return _flexgen(LAPTOP, profile, plain, figures)


def flexgen_on_t4(figures: Figures, drive: str = "t4-208gb.drive") -> System:
    return _flexgen(T4, machine(T4, figures), figures.of(drive), figures)


def accelerate_on_t4(figures: Figures) -> System:
    """Weights from memory that is not pinned, or mapped from disk; keys and values on the device."""
    profile = machine(T4, figures)
    system = _pinned(profile, profile.drive.bytes_per_s * figures.of("flexgen.mapped_share"))
    copy = system.copy * figures.of("flexgen.pageable_share")
    return System(profile, system.read, system.write, copy, system.kv_load, system.kv_save)


def zero_on_t4(figures: Figures) -> System:
    """Pinned weights, or direct reads; keys and values on the device."""
    profile = machine(T4, figures)
    return _pinned(profile, profile.drive.bytes_per_s)


def _pinned(profile: MachineProfile, read: float) -> System:
    link, back = profile.devices[1].from_host, profile.devices[1].to_host
    assert link and back
    return System(profile, read, read, link.bytes_per_s, link.bytes_per_s, back.bytes_per_s)


def _flexgen(name: str, profile: MachineProfile, plain_read: float, figures: Figures) -> System:
    pinned = _pinned(profile, plain_read * figures.of("flexgen.mapped_share"))
    write = figures[f"{name}.drive_write"].value if f"{name}.drive_write" in figures else pinned.read
    kv_load = pinned.copy * figures.of("flexgen.pageable_share")
    kernels = dequantising(profile, name, figures)
    return System(kernels, pinned.read, write, pinned.copy, kv_load, figures.of("flexgen.kv_save"))


def _plain_read(shape: Shape, figures: Figures) -> float:
    """Through the page cache: a copy out of it, after the drive where the file does not fit there."""
    profile, cache = machine(LAPTOP, figures), figures.of("paper.page_cache")
    if _is_cached(shape, profile, figures):
        return cache
    return 1 / (1 / profile.drive.bytes_per_s + 1 / cache)


def _is_cached(shape: Shape, profile: MachineProfile, figures: Figures) -> bool:
    return weight_bytes(shape, figures) <= profile.ram_bytes + profile.devices[1].memory_bytes
