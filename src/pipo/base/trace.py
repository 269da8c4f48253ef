"""What every worker did when, as zones on named rows, for https://ui.perfetto.dev."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipo.base.units import MIB

log = logging.getLogger(__name__)

MAX_ZONES = 200_000  # the oldest go first
ZONE_BYTES = 280  # 233 measured while zones are kept, and what sorting them takes
TRACE_SHARE = 16  # the zones of a trace may take this fraction of the budget
LEAST_TRACE_BYTES = 4 * MIB  # or this much: some 70 tokens of 30 blocks
_PROCESS_ID = 1


class Zone(NamedTuple):
    """Something that a row did from `start_s` to `end_s`."""

    row: str
    name: str
    start_s: float
    end_s: float
    args: Mapping[str, object] | None = None


class Tracer:
    """Keeps the newest zones. Cost: under a microsecond a zone.

    Threads: any; one deque serves all, since its append is atomic.
    """

    def __init__(self, max_zones: int = MAX_ZONES) -> None:
        self._zones: deque[Zone] = deque(maxlen=max_zones)

    @classmethod
    def within(cls, limit_bytes: int) -> Tracer:
        """Keeps as many zones as their share of the budget holds."""
        return cls(min(max(limit_bytes // TRACE_SHARE, LEAST_TRACE_BYTES) // ZONE_BYTES, MAX_ZONES))

    @property
    def most_bytes(self) -> int:
        """Memory of as many zones as are ever kept, and of writing them."""
        return (self._zones.maxlen or 0) * ZONE_BYTES

    def zone(self, row: str, name: str, start_s: float, end_s: float, args: Mapping[str, object] | None = None) -> None:
        """Record what `row` did. Times are of one Clock."""
        self._zones.append(Zone(row, name, start_s, end_s, args))

    @property
    def zones(self) -> list[Zone]:
        return list(self._zones)

    def write_perfetto(self, path: Path) -> None:
        """Write Chrome's JSON trace event format: one named row per worker, `read 2` above `read 10`.

        Source: "Trace Event Format", complete (X) and metadata (M) events.
        """
        zones = self.zones
        if len(zones) == self._zones.maxlen:
            log.warning("trace=%s zones=%d reason=older zones were dropped", path, len(zones))
        with path.open("w", encoding="utf-8") as stream:
            stream.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            separator = ""
            for event in _events(zones):
                stream.write(separator + json.dumps(event))
                separator = ",\n"
            stream.write("\n]}\n")


class NullTracer(Tracer):
    """Records nothing."""

    def __init__(self) -> None:
        super().__init__(max_zones=0)

    def zone(self, row: str, name: str, start_s: float, end_s: float, args: Mapping[str, object] | None = None) -> None:
        pass


def _events(zones: list[Zone]) -> Iterator[dict[str, object]]:
    zones.sort(key=lambda zone: zone.start_s)
    rows = {row: i for i, row in enumerate(sorted({zone.row for zone in zones}, key=_natural_key), start=1)}
    for row, thread_id in rows.items():
        yield _metadata("thread_name", thread_id, {"name": row})
        yield _metadata("thread_sort_index", thread_id, {"sort_index": thread_id})
    begin_s = zones[0].start_s if zones else 0.0
    for zone in zones:
        yield _complete_event(zone, rows[zone.row], begin_s)


def _metadata(name: str, thread_id: int, args: Mapping[str, object]) -> dict[str, object]:
    return {"ph": "M", "name": name, "pid": _PROCESS_ID, "tid": thread_id, "args": dict(args)}


def _complete_event(zone: Zone, thread_id: int, begin_s: float) -> dict[str, object]:
    event: dict[str, object] = {
        "ph": "X",
        "name": zone.name,
        "pid": _PROCESS_ID,
        "tid": thread_id,
        "ts": round((zone.start_s - begin_s) * 1e6, 3),
        "dur": round((zone.end_s - zone.start_s) * 1e6, 3),
    }
    if zone.args:
        event["args"] = dict(zone.args)
    return event


def _natural_key(row: str) -> list[tuple[int, str]]:
    """Numbers inside a name sort by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", row)]
