"""Profiles of machines that do not exist, with round figures."""

from __future__ import annotations

from pipo.base.machine import ComputeProfile, LayoutRates, LinkProfile, MachineProfile, ProductRate, RepackProfile

_RATE = ProductRate(((1, 1e-11), (4, 2e-11), (128, 5e-10)))
_CPU = ComputeProfile(
    name="CPU",
    is_cpu=True,
    num_threads=2,
    memory_bytes=16 << 30,
    products={"Q4_0": LayoutRates(_RATE, ProductRate(((1, 1e-11),))), "Q6_K": LayoutRates(_RATE)},
    attention={"F16": _RATE},
    activation_s_per_element=1e-10,
    stage_overhead_s=1e-5,
    graph_start_s=0.0,
)
MACHINE = MachineProfile(
    name="a laptop",
    source="made up",
    libggml="",
    num_cores=2,
    ram_bytes=16 << 30,
    drive=LinkProfile(4e9, 1e-4, 4 << 20, 8),
    drive_ways=(LinkProfile(3e9, 1e-4, 1 << 20, 4), LinkProfile(4e9, 1e-4, 4 << 20, 8)),
    ram_copy=LinkProfile(2e10),
    repack={"Q4_0": RepackProfile(7e9, 2e9)},
    devices=(_CPU,),
)
GPU = ComputeProfile(
    name="a card",
    is_cpu=False,
    num_threads=1,
    memory_bytes=6 << 30,
    products={"Q4_0": LayoutRates(ProductRate.roofline(0.5625, 3e11, 1e13))},
    attention={"F16": ProductRate.roofline(2.0, 3e11, 1e13)},
    activation_s_per_element=1e-11,
    stage_overhead_s=5e-5,
    graph_start_s=1e-5,
    from_host=LinkProfile(1.2e10, 1e-5),
    to_host=LinkProfile(1.1e10, 1e-5),
)
