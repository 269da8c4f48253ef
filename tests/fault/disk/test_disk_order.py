"""transfer.disk while all is well: which read comes when, and what a handle says about it."""

from __future__ import annotations

from pathlib import Path

from pipo.base.manifest import Extent, FileIdx
from pipo.base.trace import Tracer
from pipo.transfer.disk import DriveSettings
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.disk_units import READS_PER_UNIT, outcomes, slots, submit_all
from tests.support.transfers import SMALL_CHUNKS, opened, xor_rows


def test_waiting_shorter_than_the_read(path: Path, content: bytes) -> None:
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.05)
    with opened([path], repack=xor_rows, preadv=preadv) as disk, slots(disk.ledger) as places:
        handle = submit_all(disk.transfer, places)[0]
        handle.wait(0)
        assert not handle.is_done and handle.finished_s is None
        handle.wait()
        assert handle.is_done


def test_times_and_bytes_of_a_handle(path: Path, content: bytes) -> None:
    tracer = Tracer()
    with opened([path], repack=xor_rows, tracer=tracer) as disk, slots(disk.ledger) as places:
        handles = submit_all(disk.transfer, places)
        outcomes(handles)
        for handle in handles:
            times = (handle.submitted_s, handle.started_s, handle.read_s, handle.finished_s)
            assert None not in times and list(times) == sorted(t for t in times if t is not None)
            # 150 000 plain bytes touch 37 or 38 pages; two chunks of 64 and 16 rows of 1000 bytes touch 17 + 5 at most
            assert handle.num_bytes == 230_000 and 230_000 < handle.read_bytes <= 60 * 4096
    names = [zone.name for zone in tracer.zones]
    assert names.count("unit 1") == READS_PER_UNIT and names.count("repack unit 1") == 2
    assert {zone.row for zone in tracer.zones} <= {"read 0", "read 1", "read 2"}


def test_first_come_first_served_without_a_gap_between_units(path: Path, content: bytes) -> None:
    settings = DriveSettings(SMALL_CHUNKS.chunk_bytes, num_workers=2)
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.005)
    with opened([path], settings, repack=xor_rows, preadv=preadv) as disk, slots(disk.ledger) as places:
        handles = submit_all(disk.transfer, places)
        outcomes(handles)
        for first, second in ((handles[0], handles[1]), (handles[1], handles[2])):
            assert first.started_s is not None and second.started_s is not None and first.finished_s is not None
            assert first.started_s <= second.started_s <= first.finished_s


def test_rows_go_ahead_of_queued_units(path: Path, content: bytes) -> None:
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.01)
    with opened([path], repack=xor_rows, preadv=preadv) as disk, slots(disk.ledger) as places:
        handles = submit_all(disk.transfer, places)
        assert disk.transfer.read_now(Extent(FileIdx(0), 699_000, 1000)) == content[699_000:]
        assert not handles[-1].is_done
        assert outcomes(handles) == [None, None, None]
