"""Machine profiles from published figures, and what another system's kernels make of the same device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from bench.paper.figures import Figures
from pipo.base.machine import ComputeProfile, LayoutRates, LinkProfile, MachineProfile, ProductRate

PROMPT_ROWS = 512  # from this many on the T4 computes at its prefill rate: one prompt
MICRO_BATCH_ROWS = 72  # up to this many at its decode rate: FlexGen's largest micro-batch
MANY_ROWS = 1 << 20
F16_BYTES = 2.0

NAMES = {
    "rtx3060-laptop": "Laptop of the PIPO paper (RTX 3060 6 GB, i7-11800H, 16 GB)",
    "t4-208gb": "Machine of the FlexGen paper (T4 16 GB, 208 GB, cloud SSD)",
    "rtx5060-laptop": "A laptop of 2025 (RTX 5060 8 GB, Core Ultra 7 255HX, 32 GB)",
}
SOURCE = "published figures, data sheets and assumptions: bench/paper/assumptions.toml names the source of each"


def machine(name: str, figures: Figures) -> MachineProfile:
    get = _getter(name, figures)
    device = _t4(figures) if name == "t4-208gb" else _laptop_gpu(name, figures)
    return MachineProfile(
        name=NAMES[name],
        source=SOURCE,
        libggml="",
        num_cores=int(get("cpu_cores")),
        ram_bytes=int(get("ram")),
        drive=LinkProfile(get("drive")),
        ram_copy=LinkProfile(get("ram_copy")),
        devices=(_cpu(name, figures), device),
    )


def _getter(name: str, figures: Figures) -> Callable[[str], float]:
    return lambda key: figures.of(f"{name}.{key}")


def _cpu(name: str, figures: Figures) -> ComputeProfile:
    get = _getter(name, figures)
    fitted = figures.get("t4-208gb.cpu_attention_flops") if name == "t4-208gb" else None
    attention = ProductRate.roofline(F16_BYTES, get("ram_bandwidth"), fitted.value if fitted else get("cpu_flops"))
    return ComputeProfile(
        name="CPU",
        is_cpu=True,
        num_threads=int(get("cpu_cores")),
        memory_bytes=int(get("ram")),
        products={
            type_: LayoutRates(ProductRate.roofline(num_bytes, get("ram_bandwidth"), get("cpu_flops")))
            for type_, num_bytes in _weight_bytes(figures).items()
        },
        attention={"F16": attention},
        activation_s_per_element=figures.of("gpu.activation_bytes") / get("ram_bandwidth"),
        stage_overhead_s=0.0,
        graph_start_s=0.0,
    )


def _weight_bytes(figures: Figures) -> dict[str, float]:
    return {"Q4_0": figures.of("workload.int4_bytes"), "F16": F16_BYTES}


def _laptop_gpu(name: str, figures: Figures) -> ComputeProfile:
    get = _getter(name, figures)
    bandwidth = get("device_bandwidth") * figures.of("gpu.bandwidth_share")
    flops = get("tensor_flops") * figures.of("gpu.tensor_share")
    products = {
        type_: ProductRate.roofline(num_bytes, bandwidth, flops) for type_, num_bytes in _weight_bytes(figures).items()
    }
    decode = get("device_bandwidth") * figures.of("gpu.attention_bandwidth_share") / F16_BYTES
    prefill = flops * figures.of("gpu.prefill_attention_share")
    link = LinkProfile(get("link"))
    return _gpu(name, figures, products, _attention(decode, prefill, figures), link, link)


def _t4(figures: Figures) -> ComputeProfile:
    get = _getter("t4-208gb", figures)
    bandwidth = get("device_bandwidth") * figures.of("gpu.bandwidth_share")
    products = {
        type_: two_rates(num_bytes, bandwidth, get("decode_flops"), get("prefill_flops"))
        for type_, num_bytes in _weight_bytes(figures).items()
    }
    attention = _attention(get("decode_attention_flops") / 2, get("prefill_attention_flops"), figures)
    return _gpu("t4-208gb", figures, products, attention, LinkProfile(get("link")), LinkProfile(get("link_back")))


def two_rates(bytes_per_element: float, bytes_per_s: float, decode_flops: float, prefill_flops: float) -> ProductRate:
    """Bound by memory, then by the rate of a micro-batch, then by that of a prompt."""
    move_s, row_s = bytes_per_element / bytes_per_s, 2 / decode_flops
    knee = max(math.floor(move_s / row_s), 1)
    points = {1: move_s, knee: max(move_s, knee * row_s), MICRO_BATCH_ROWS: MICRO_BATCH_ROWS * row_s}
    return ProductRate((*sorted(points.items()), (PROMPT_ROWS, PROMPT_ROWS * 2 / prefill_flops)))


def _attention(decode_elements_per_s: float, prefill_flops: float, figures: Figures) -> dict[str, ProductRate]:
    """Of one query row and of a prompt's. A compressed cache is read in fewer bytes, at the same rate."""
    compressed = figures.of("workload.int4_kv_bytes") / F16_BYTES
    prompt = (PROMPT_ROWS, PROMPT_ROWS * 2 / prefill_flops)
    return {
        "F16": ProductRate(((1, 1 / decode_elements_per_s), prompt)),
        "Q4_0": ProductRate(((1, compressed / decode_elements_per_s), prompt)),
    }


def _gpu(
    name: str,
    figures: Figures,
    products: dict[str, ProductRate],
    attention: dict[str, ProductRate],
    from_host: LinkProfile,
    to_host: LinkProfile,
) -> ComputeProfile:
    get = _getter(name, figures)
    bandwidth = get("device_bandwidth") * figures.of("gpu.bandwidth_share")
    return ComputeProfile(
        name="GPU",
        is_cpu=False,
        num_threads=1,
        memory_bytes=int(get("device_memory")),
        products={type_: LayoutRates(rate) for type_, rate in products.items()},
        attention=attention,
        activation_s_per_element=figures.of("gpu.activation_bytes") / bandwidth,
        stage_overhead_s=figures.of("gpu.stage_overhead"),
        graph_start_s=figures.of("gpu.task_overhead"),
        from_host=from_host,
        to_host=to_host,
    )


def dequantising(profile: MachineProfile, name: str, figures: Figures) -> MachineProfile:
    """With kernels that turn weights and cache of 4 bits into FP16 before each product, as FlexGen's do."""
    cpu, device = profile.devices
    bandwidth = figures.of(f"{name}.device_bandwidth") * figures.of("gpu.bandwidth_share")
    extra_s = figures.of("flexgen.dequantise_bytes") / bandwidth
    products = {**device.products, "Q4_0": LayoutRates(_slower(device.products["F16"].plain, extra_s))}
    attention = {**device.attention, "Q4_0": _slower(device.attention["F16"], extra_s)}
    return replace(profile, devices=(cpu, replace(device, products=products, attention=attention)))


def _slower(rate: ProductRate, seconds: float) -> ProductRate:
    """Per element, whatever the number of rows: a last point far out, because rates grow with the rows beyond it."""
    points = (*rate.points, (MANY_ROWS, rate.seconds(1, MANY_ROWS)))
    return ProductRate(tuple((rows, each + seconds) for rows, each in points))
