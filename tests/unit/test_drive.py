"""hardware.drive and hardware.cache: rates come from the real read path and are kept between runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipo.base.clock import RealClock
from pipo.base.manifest import Extent, FileIdx
from pipo.base.units import KIB, MIB
from pipo.hardware.cache import cache_file, drive_key, drive_rates
from pipo.hardware.drive import ALL_COMBOS, QUICK_COMBOS, DriveRate, best_rate, measure_drive
from pipo.transfer.disk import DriveSettings
from tests.support.transfers import deadline

COMBOS = (DriveSettings(64 * KIB, 2), DriveSettings(256 * KIB, 1, direct=False))
RATES = (DriveRate(MIB, 4, 2.5e9, True), DriveRate(4 * MIB, 8, 2.6e9, True))


def test_every_combination_is_measured(model: Path) -> None:
    with deadline(10):
        rates = measure_drive([model, model], combos=COMBOS, duration_s=0.05)
    assert [(r.chunk_bytes, r.num_workers) for r in rates] == [(64 * KIB, 2), (256 * KIB, 1)]
    assert all(r.bytes_per_s > 1e6 for r in rates)
    assert not rates[1].direct


@pytest.mark.parametrize("sizes", [[1], [100, 5000, 1], [300_000, 0, 300_000]])
def test_only_the_given_extents_are_needed(model: Path, sizes: list[int]) -> None:
    extents = [Extent(FileIdx(0), 7 + 310_000 * i, size) for i, size in enumerate(sizes)]
    with deadline(10):
        rates = measure_drive([model], extents, combos=COMBOS, duration_s=0.02)
    assert all(r.bytes_per_s > 0 for r in rates)


def test_combinations_asked_for() -> None:
    assert {(c.chunk_bytes // MIB, c.num_workers) for c in ALL_COMBOS} == {
        (chunk, workers) for chunk in (1, 4, 16) for workers in (1, 4, 8, 16)
    }
    assert max(c.chunk_bytes * c.num_workers for c in QUICK_COMBOS) == 32 * MIB


def test_a_thread_that_loses_its_core_still_measures(tmp_path: Path) -> None:
    """Time may be over before the first read was asked for."""

    class Jumping(RealClock):
        _now_s = 0.0

        def now(self) -> float:
            self._now_s += 10
            return self._now_s

    model = tmp_path / "model"
    model.write_bytes(bytes(MIB))
    assert all(rate.bytes_per_s > 0 for rate in measure_drive([model], combos=COMBOS, duration_s=0.01, clock=Jumping()))


def test_best_keeps_the_most_in_flight_of_those_as_fast() -> None:
    slow, lean, large = DriveRate(MIB, 1, 2.0e9, True), DriveRate(MIB, 8, 2.7e9, True), DriveRate(MIB, 16, 2.68e9, True)
    assert best_rate([large, lean, slow]) is large
    assert best_rate([lean, slow]) is lean


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, files: Sequence[Path]) -> tuple[DriveRate, ...]:
        self.calls += 1
        return RATES


def test_measured_once_per_drive(large: Path, tmp_path: Path) -> None:
    file, measure = tmp_path / "deep" / "er" / "drives.json", Counted()
    assert drive_rates([large], file=file, measure=measure) == RATES
    assert drive_rates([large], file=file, measure=measure) == RATES
    assert measure.calls == 1
    assert list(file.parent.iterdir()) == [file], "nothing is left beside it"


def test_what_a_small_file_gives_is_not_kept(model: Path, tmp_path: Path) -> None:
    """54 bytes made a drive look like one of 1 MB/s, for good."""
    file, measure = tmp_path / "drives.json", Counted()
    for _ in range(2):
        assert drive_rates([model], file=file, measure=measure) == RATES
    assert measure.calls == 2 and not file.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"KEY": 5}',
        '{"KEY": []}',
        '{"KEY": [{"chunk_bytes": 1}]}',
        '{"KEY": [{"chunk_bytes": -1, "num_workers": 1, "bytes_per_s": 1.0, "direct": true}]}',
        '{"KEY": [{"chunk_bytes": "x", "num_workers": 1, "bytes_per_s": 1.0, "direct": true}]}',
        '{"KEY": [{"chunk_bytes": 4096, "num_workers": 1, "bytes_per_s": NaN, "direct": true}]}',
        '{"KEY": [{"chunk_bytes": 4096.5, "num_workers": 1, "bytes_per_s": 1.0, "direct": true}]}',
        '{"KEY": [{"chunk_bytes": 5000, "num_workers": 1, "bytes_per_s": 1.0, "direct": true}]}',
        "\xff",
    ],
)
def test_broken_cache_is_measured_again(
    large: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    file, measure = tmp_path / "drives.json", Counted()
    file.write_text(text.replace("KEY", drive_key(large)), encoding="latin-1")
    assert drive_rates([large], file=file, measure=measure) == RATES
    assert measure.calls == 1 and "action=measure" in caplog.text
    assert drive_rates([large], file=file, measure=measure) == RATES and measure.calls == 1


def test_other_drives_are_kept(large: Path, tmp_path: Path) -> None:
    file = tmp_path / "drives.json"
    file.write_text('{"another": [1]}')
    drive_rates([large], file=file, measure=Counted())
    assert json.loads(file.read_text()).keys() == {"another", drive_key(large)}


def test_unwritable_cache_does_not_stop_the_run(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert drive_rates([large], file=large / "drives.json", measure=Counted()) == RATES
    assert "drives.json" in caplog.text


def test_where_the_cache_is() -> None:
    assert cache_file({"XDG_CACHE_HOME": "/x"}) == Path("/x/pipo/drives.json")
    assert cache_file({}) == Path.home() / ".cache/pipo/drives.json"
    assert cache_file({"XDG_CACHE_HOME": "somewhere"}) == cache_file({})
