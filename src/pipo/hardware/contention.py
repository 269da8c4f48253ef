"""What computing and the drive take from each other where both are at work: cores, and the way to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipo.base.machine import SharedUse
from pipo.base.units import MIB
from pipo.compute.devices import CpuBackend
from pipo.compute.graphs import WeightType
from pipo.hardware.compute_rates import BlockShape, products
from pipo.hardware.drive import measure_beside, places_fit
from pipo.hardware.meter import Meter
from pipo.tiers.ram import Place
from pipo.transfer.disk import DriveSettings

_LEAST_CHUNK_BYTES = MIB // 4
_NUM_MEASUREMENTS = 4  # each alone, and with either number of threads


def measure_shared_use(
    meter: Meter,
    backend: CpuBackend,
    spare: Place,
    files: Sequence[Path],
    settings: DriveSettings,
    layout: WeightType,
    duration_s: float,
    shape: BlockShape,
) -> tuple[SharedUse, ...]:
    """Of products of one row over the meter's weights, beside reads into `spare`, for all threads and for one less.

    In smaller requests where `spare` holds no others; nothing where it holds none. Threads: the one that computes.
    Raises TransferError.
    """
    while not places_fit(settings, spare):
        settings = replace(settings, chunk_bytes=settings.chunk_bytes // 2)
        if settings.chunk_bytes < _LEAST_CHUNK_BYTES:
            return ()
    each_s = duration_s / _NUM_MEASUREMENTS
    counts = [count for count in (backend.num_threads, backend.num_threads - 1) if count]
    read_alone, _ = measure_beside(files, settings, spare, each_s, lambda: None)
    found = []
    with products(meter, layout, shape.hidden_size, 1) as (graph, addresses):
        alone = meter.runs_per_s(graph, addresses, each_s)
        compute = partial(meter.runs_per_s, graph, addresses, each_s)
        for count in counts:
            with backend.fewer_threads(count):
                read, computed = measure_beside(files, settings, spare, each_s, compute)
            found.append(SharedUse(count, computed / alone, min(read / read_alone, 1.0)))
    return tuple(found)
