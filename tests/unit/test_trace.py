"""base.trace and base.clock: what is written can be read back as the Trace Event Format."""

from __future__ import annotations

import json
import threading
import tracemalloc
from pathlib import Path

import pytest

from pipo.base.clock import RealClock, VirtualClock
from pipo.base.trace import NullTracer, Tracer


def events(tracer: Tracer, path: Path) -> list[dict[str, object]]:
    tracer.write_perfetto(path)
    found = json.loads(path.read_text())["traceEvents"]
    assert isinstance(found, list)
    return found


def test_zones_become_complete_events_from_the_first_begin(tmp_path: Path) -> None:
    tracer = Tracer()
    tracer.zone("compute", "mlp 1", 12.0, 12.5, {"tokens": 7})
    tracer.zone("read 0", "mlp 1", 10.0, 11.25)
    complete = [event for event in events(tracer, tmp_path / "t.json") if event["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in complete] == [("mlp 1", 0.0, 1.25e6), ("mlp 1", 2e6, 5e5)]
    assert complete[1]["args"] == {"tokens": 7} and "args" not in complete[0]


def test_one_named_row_per_worker_in_the_order_of_numbers(tmp_path: Path) -> None:
    tracer = Tracer()
    for row in ("read 10", "compute", "read 2"):
        tracer.zone(row, "x", 0.0, 1.0)
    found = events(tracer, tmp_path / "t.json")
    names = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert [names[tid] for tid in sorted(names)] == ["compute", "read 2", "read 10"]
    order = {e["tid"]: e["args"]["sort_index"] for e in found if e["name"] == "thread_sort_index"}
    assert order == {tid: tid for tid in names}


def test_an_empty_trace_is_valid(tmp_path: Path) -> None:
    assert events(Tracer(), tmp_path / "t.json") == []


def test_no_zone_is_lost_between_threads() -> None:
    tracer = Tracer()

    def record(row: str) -> None:
        for i in range(2000):
            tracer.zone(row, str(i), i, i + 1)

    threads = [threading.Thread(target=record, args=(f"read {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tracer.zones) == 8000
    assert {zone.row for zone in tracer.zones} == {"read 0", "read 1", "read 2", "read 3"}


def test_the_newest_zones_stay_and_the_loss_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer(max_zones=3)
    for i in range(5):
        tracer.zone("row", str(i), i, i + 1)
    assert [zone.name for zone in tracer.zones] == ["2", "3", "4"]
    tracer.write_perfetto(tmp_path / "t.json")
    assert "older zones were dropped" in caplog.text


def test_zones_take_no_more_than_is_charged_for_them_written_or_kept(tmp_path: Path) -> None:
    tracer = Tracer(max_zones=20_000)
    tracemalloc.start()
    try:
        for i in range(25_000):
            tracer.zone("compute", f"wait for mlp {i % 60}", i * 1e-3, i * 1e-3 + 1e-4)
        tracer.write_perfetto(tmp_path / "t.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= tracer.most_bytes + (1 << 19)


def test_null_tracer_keeps_nothing() -> None:
    tracer = NullTracer()
    tracer.zone("row", "x", 0.0, 1.0)
    assert tracer.zones == []


def test_virtual_time_passes_only_in_sleep() -> None:
    clock = VirtualClock(5.0)
    assert clock.now() == clock.now() == 5.0
    clock.sleep(2.5)
    clock.sleep(-1.0)
    assert clock.now() == 7.5


def test_real_time_passes() -> None:
    clock = RealClock()
    begin = clock.now()
    clock.sleep(0.002)
    assert clock.now() - begin >= 0.002
