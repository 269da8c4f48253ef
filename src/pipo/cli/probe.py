"""`pipo doctor --probe`: measure with a bar, and the figures as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipo.base.machine import ComputeProfile, LinkProfile, MachineProfile, ProductRate
from pipo.base.tensor_type import TensorType
from pipo.base.units import format_rate, format_size
from pipo.cli.flags import ComputeFlags, MemoryFlags, OutputFlags, make_config

if TYPE_CHECKING:
    from pipo.cli.terminal import Row
    from pipo.compute.ggml import Library
    from pipo.hardware.cache import KnownProfile

_PREFILL_TOKENS = (128, 512)


def probe_with_bar(file: Path, *, is_model_named: bool, fresh: bool, output: OutputFlags) -> KnownProfile:
    """The profile for the drive under `file`, with its types where it was named, else the common ones."""
    from pipo.compute import ggml
    from pipo.formats.checkpoint import open_weight_files
    from pipo.hardware.cache import known_profile
    from pipo.hardware.probe import COMMON_TYPES

    lib, weights = ggml.load(), open_weight_files(file)
    types = [t for t in (weights.matrix_types if is_model_named else COMMON_TYPES) if lib.multiplies(t)] or list(
        COMMON_TYPES
    )
    num_threads = make_config(MemoryFlags(), ComputeFlags()).num_threads

    def measure(wanted: Sequence[TensorType]) -> MachineProfile:
        with _bar(output) as on_progress:
            return _measure(lib, num_threads, weights.files, wanted, on_progress)

    return known_profile(weights.files, lib, num_threads, types, measure, fresh=fresh)


def _measure(
    lib: Library,
    num_threads: int,
    files: Sequence[Path],
    types: Sequence[TensorType],
    on_progress: Callable[[str, float], None],
) -> MachineProfile:
    from pipo.compute.devices import CpuBackend
    from pipo.compute.repack import RepackBuffer
    from pipo.hardware.probe import Scope, probe

    backend, repack = CpuBackend(lib, num_threads), RepackBuffer.find(lib)
    try:
        return probe(lib, backend, repack, Scope(files, types), on_progress)
    finally:
        backend.close()
        if repack is not None:
            repack.close()


@contextmanager
def _bar(output: OutputFlags) -> Iterator[Callable[[str, float], None]]:
    from pipo.cli.terminal import stderr

    if output.quiet or not stderr().is_terminal:
        yield lambda step, fraction: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr(), transient=True) as bars:
        task = bars.add_task("measuring", total=1.0)
        yield lambda step, fraction: bars.update(task, description=step, completed=fraction)


def profile_dict(known: KnownProfile) -> dict[str, object]:
    """As the file holds it, and why it was measured now; null where it was not."""
    profile = cast(dict[str, object], json.loads(known.profile.to_json()))
    return {"measured_now_because": known.why or None} | profile


def print_profile(known: KnownProfile) -> None:
    from pipo.cli.terminal import print_columns, print_rows, stdout

    profile = known.profile
    print_rows(stdout(), "probe", _rows(known))
    stdout().print()
    print_columns(stdout(), ("requests of", "1 at a time", *_depths(profile)[1:]), list(_drive_lines(profile)), "  ")
    for device in profile.devices:
        stdout().print()
        head = ("type", "layout", "GB/s, one token", *(f"GFLOP/s, {n}" for n in _PREFILL_TOKENS), "repacking, a thread")
        print_columns(stdout(), head, list(_product_lines(profile, device)), "  ")


def _rows(known: KnownProfile) -> Iterator[Row]:
    from pipo.hardware.cache import profile_file

    profile = known.profile
    yield "figures", profile.source + ("" if known.is_new else f", kept in {profile_file()}; --fresh measures again")
    if known.is_new:
        yield "measured", f"now: {known.why}"
    yield "drive", f"{_link_text(profile.drive)}, {profile.drive.latency_s * 1e6:.0f} µs for a page"
    yield "RAM copy", format_rate(profile.ram_copy.bytes_per_s)
    for name, repack in profile.repack.items():
        yield "repacked", f"{name} at {format_rate(repack.read_bytes_per_s)} from the drive"
    for device in profile.devices:
        yield from _device_rows(device)
    for use in profile.shared_uses:
        threads = "1 thread" if use.num_threads == 1 else f"{use.num_threads} threads"
        yield (
            "both",
            f"computing with {threads} keeps {use.compute_share:.0%} of its speed, the drive {use.read_share:.0%}",
        )


def _device_rows(device: ComputeProfile) -> Iterator[Row]:
    yield device.name, f"{device.num_threads} threads, {format_size(device.memory_bytes)}"
    yield (
        "a stage",
        f"{device.stage_overhead_s * 1e6:.0f} µs, and {device.graph_start_s * 1e6:.0f} µs in a graph of its own",
    )
    for name, rate in device.attention.items():
        many = rate.seconds(1, 128) / 128
        yield (
            "attention",
            f"over {name}: {rate.seconds(1, 1) * 1e9:.2f} ns an element, {many * 1e9:.3f} ns a row of 128",
        )
    for title, link in (("to it", device.from_host), ("from it", device.to_host)):
        if link is not None:
            yield title, _link_text(link)


def _link_text(link: LinkProfile) -> str:
    way = "" if link.chunk_bytes is None else f" with {link.depth or 1} of {format_size(link.chunk_bytes)} at a time"
    return f"{format_rate(link.bytes_per_s)}{way}"


def _depths(profile: MachineProfile) -> list[str]:
    return [str(depth) for depth in sorted({way.depth or 1 for way in profile.drive_ways})]


def _drive_lines(profile: MachineProfile) -> Iterator[list[str]]:
    """A line per size of request, a column per number in flight."""
    rates = {(way.chunk_bytes or 0, str(way.depth or 1)): way.bytes_per_s for way in profile.drive_ways}
    for chunk in sorted({chunk for chunk, _ in rates}):
        cells = [rates.get((chunk, depth)) for depth in _depths(profile)]
        yield [format_size(chunk), *("" if rate is None else format_rate(rate) for rate in cells)]


def _product_lines(profile: MachineProfile, device: ComputeProfile) -> Iterator[list[str]]:
    for name, rates in device.products.items():
        yield [name, "plain", *_product_cells(TensorType[name], rates.plain), ""]
        if rates.repacked is not None:
            cells = _product_cells(TensorType[name], rates.repacked)
            repack = profile.repack.get(name)
            yield ["", "repacked", *cells, "" if repack is None else format_rate(repack.bytes_per_s)]


def _product_cells(type_: TensorType, rate: ProductRate) -> list[str]:
    bytes_per_s = type_.block_bytes / type_.block_elems / rate.seconds(1, 1)
    return [f"{bytes_per_s / 1e9:.1f}", *(f"{2 * n / rate.seconds(1, n) / 1e9:.0f}" for n in _PREFILL_TOKENS)]
