"""How fast is the drive under the model? Every request size and number in flight, over what an engine would stream."""

from __future__ import annotations

from collections.abc import Iterator

from bench.lab import Lab
from bench.rows import Row, row
from pipo.base.units import MIB


def measure(lab: Lab) -> Iterator[Row]:
    facts = lab.plan(lab.setup(lab.tight_bytes()))
    drive = lab.open_drive(facts)
    by_way: dict[str, list[float]] = {}
    for _ in range(lab.settings.rounds):
        drive.sweep("sweep")
        for rate in drive.last_rates:
            way = f"{rate.chunk_bytes // MIB} MiB × {rate.num_workers}"
            by_way.setdefault(way, []).append(rate.bytes_per_s / 1e9)
    for way, rates in by_way.items():
        yield row("read rate", way, "GB/s", rates)
    yield from drive.rows()
