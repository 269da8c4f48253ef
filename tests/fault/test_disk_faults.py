"""transfer.disk when the drive, the file or the caller misbehaves: every handle ends, errors say what was missing,
nothing hangs and the ledger returns to zero."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from pipo.base.clock import VirtualClock
from pipo.base.errors import Cancelled, ComputeError, FileChanged, OverBudget, PipoError, ReadFailed, UnexpectedEof
from pipo.base.manifest import Extent, FileIdx
from pipo.base.trace import NullTracer, Tracer
from pipo.store.index import Read, UnitLayout, layout_unit
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer import files as transfer_files
from pipo.transfer.disk import CLOSE_S, DiskTransfer, DriveSettings
from pipo.transfer.files import Preadv
from pipo.transfer.handle import Handle
from pipo.transfer.null import Fault, NullDrive, NullTransfer, faulty_preadv
from tests.support.transfers import SMALL_CHUNKS, Opened, deadline, matrix, opened, write_random, xor_rows, xored

FILE_BYTES = 700_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT and posix_fadvise")
# per unit: three plain chunks in one read, and two repacked chunks, of 64 KiB
UNITS = [
    [matrix(f"a{i}", 200 * i + start, 1000, 150), matrix(f"b{i}", 200 * i + start + 150_000, 1000, 80)]
    for i, start in enumerate((0, 231_000, 462_000))
]
LAYOUTS = [layout_unit(unit, repacked=[unit[1].name]) for unit in UNITS]
READS_PER_UNIT = 5


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with deadline(15):
        yield


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    for thread in [t for t in threading.enumerate() if t.name.startswith("pipo read")]:
        thread.join(0.5)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture
def content(path: Path) -> bytes:
    return write_random(path, FILE_BYTES)


class Slots:
    """A place per unit of UNITS."""

    def __init__(self, disk: Opened) -> None:
        self._arena = Arena(sum(layout.num_bytes + 4096 for layout in LAYOUTS), name="slots", ledger=disk.ledger)
        self.places = [self._arena.take(layout.num_bytes) for layout in LAYOUTS]

    def __enter__(self) -> list[Place]:
        return self.places

    def __exit__(self, *_: object) -> None:
        self._arena.close()


def submit_all(transfer: DiskTransfer | NullTransfer, places: Sequence[Place]) -> list[Handle]:
    return [
        transfer.submit(layout.reads, place, f"unit {i}")
        for i, (layout, place) in enumerate(zip(LAYOUTS, places, strict=True))
    ]


def outcomes(handles: Sequence[Handle]) -> list[BaseException | None]:
    found: list[BaseException | None] = []
    for handle in handles:
        try:
            handle.wait(10)
            found.append(None)
        except PipoError as error:
            found.append(error)
        assert handle.is_done and handle.finished_s is not None
    return found


def check_bytes(unit_idx: int, place: Place, content: bytes) -> None:
    layout: UnitLayout = LAYOUTS[unit_idx]
    for tensor, repacked in zip(UNITS[unit_idx], (False, True), strict=True):
        start = layout.offsets[tensor.name]
        wanted = content[tensor.extent.offset : tensor.extent.end]
        assert bytes(place.view[start : start + tensor.num_bytes]) == (xored(wanted) if repacked else wanted)


class Sweep(NamedTuple):
    nth: int
    for_ever: bool
    direct: bool


SWEEPS = [
    Sweep(nth, for_ever, direct)
    for nth in (1, 2, 3, 5, 6, 11, 15)
    for for_ever in (False, True)
    for direct in (True, False)
]
over_sweeps = pytest.mark.parametrize("sweep", SWEEPS, ids=str)


def run_sweep(
    path: Path, fault: Fault, sweep: Sweep, check: Callable[[Opened, list[Handle], list[Place]], None]
) -> None:
    preadv = faulty_preadv(fault, sweep.nth, for_ever=sweep.for_ever, delay_s=0.002)
    settings = DriveSettings(SMALL_CHUNKS.chunk_bytes, SMALL_CHUNKS.num_workers, sweep.direct)
    with opened([path], settings, repack=xor_rows, preadv=preadv) as disk:
        with Slots(disk) as places:
            check(disk, submit_all(disk.transfer, places), places)
        disk.transfer.close()
        assert disk.ledger.in_use_bytes == 0 and disk.ledger.breakdown() == {}


@pytest.mark.parametrize(("fault", "kind"), [(Fault.FAIL, ReadFailed), (Fault.END, UnexpectedEof)])
@over_sweeps
def test_nth_read_fails(path: Path, content: bytes, fault: Fault, kind: type[PipoError], sweep: Sweep) -> None:
    def check(disk: Opened, handles: list[Handle], places: list[Place]) -> None:
        found = outcomes(handles)
        errors = [error for error in found if error is not None]
        assert errors and all(type(error) is kind for error in errors) and str(path) in str(errors[0])
        for i, error in enumerate(found):
            if error is None:
                check_bytes(i, places[i], content)
        # poisoned: the same error, at once and for good
        later = disk.transfer.submit(LAYOUTS[0].reads, places[0], "later")
        assert later.is_done and outcomes([later, *handles])[0] in errors
        with pytest.raises(kind):
            disk.transfer.read_now(Extent(FileIdx(0), 0, 10))

    run_sweep(path, fault, sweep, check)


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.SLOW])
@over_sweeps
def test_short_and_slow_reads_only_take_longer(path: Path, content: bytes, fault: Fault, sweep: Sweep) -> None:
    def check(disk: Opened, handles: list[Handle], places: list[Place]) -> None:
        assert outcomes(handles) == [None, None, None]
        for i, place in enumerate(places):
            check_bytes(i, place, content)

    run_sweep(path, fault, sweep, check)


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.ENOMEM])
def test_error_says_what_was_wanted(path: Path, content: bytes, number: int) -> None:
    with opened([path], preadv=faulty_preadv(Fault.FAIL, 1, error=number)) as disk:
        with pytest.raises(ReadFailed) as failed:
            disk.transfer.read_now(Extent(FileIdx(0), 5000, 100))
        error = failed.value
        assert (error.path, error.offset, error.wanted_bytes, error.got_bytes) == (str(path), 4096, 1004, 0)
        assert errno.errorcode[number] in str(error)


def test_file_shorter_than_its_tensors(path: Path) -> None:
    write_random(path, 10_000)
    with opened([path]) as disk:
        assert len(disk.transfer.read_now(Extent(FileIdx(0), 9000, 1000))) == 1000
        with pytest.raises(UnexpectedEof) as failed:
            disk.transfer.read_now(Extent(FileIdx(0), 9000, 1001))
        assert (failed.value.wanted_bytes, failed.value.got_bytes) == (1809, 1808)


@pytest.mark.parametrize("size", [4096, 8192])
def test_file_that_ends_on_a_page(path: Path, size: int) -> None:
    content = write_random(path, size)
    with opened([path]) as disk:
        assert disk.transfer.read_now(Extent(FileIdx(0), 0, size)) == content
        with pytest.raises(UnexpectedEof):
            disk.transfer.read_now(Extent(FileIdx(0), size, 1))


def cut(path: Path) -> None:
    os.truncate(path, FILE_BYTES // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"new")
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    write_random(path.with_suffix(".new"), FILE_BYTES, seed=1)
    path.with_suffix(".new").replace(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [cut, overwrite])
def test_change_of_the_open_file_is_seen_by_the_next_submit(
    path: Path, content: bytes, change: Callable[[Path], None]
) -> None:
    with opened([path], repack=xor_rows) as disk, Slots(disk) as places:
        assert outcomes(submit_all(disk.transfer, places)) == [None, None, None]
        change(path)
        assert {type(error) for error in outcomes(submit_all(disk.transfer, places))} == {FileChanged}
        with pytest.raises(FileChanged):
            disk.transfer.read_now(Extent(FileIdx(0), 0, 1))


@pytest.mark.parametrize("change", [cut, overwrite, replace, remove])
def test_change_of_the_path_is_seen_by_check_files(path: Path, content: bytes, change: Callable[[Path], None]) -> None:
    with opened([path], repack=xor_rows) as disk, Slots(disk) as places:
        disk.transfer.check_files()
        change(path)
        with pytest.raises(FileChanged) as failed:
            disk.transfer.check_files()
        assert str(path) in str(failed.value)
        assert outcomes(submit_all(disk.transfer, places)) == [failed.value] * 3


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ReadFailed, match="ENOENT"), opened([tmp_path / "gone"]):
        pass


@LINUX
def test_refused_start_leaves_no_descriptor(path: Path, content: bytes) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OverBudget):
        DiskTransfer(
            [path, path], SMALL_CHUNKS, repack=None, ledger=Ledger(1), tracer=NullTracer(), clock=VirtualClock()
        )
    with pytest.raises(ReadFailed), opened([path, path.with_name("gone")]):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> Preadv:
    def refuse(path: Path) -> int:
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    monkeypatch.setattr(transfer_files, "_open_uncached", refuse)
    return os.preadv


def refuse_at_first_read(monkeypatch: pytest.MonkeyPatch) -> Preadv:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return os.preadv(fd, buffers, offset)

    return preadv


@LINUX
@pytest.mark.parametrize("refuse", [refuse_at_open, refuse_at_first_read])
def test_direct_reads_refused(
    path: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refuse: Callable[[pytest.MonkeyPatch], Preadv],
) -> None:
    with opened([path], repack=xor_rows, preadv=refuse(monkeypatch)) as disk, Slots(disk) as places:
        assert outcomes(submit_all(disk.transfer, places)) == [None, None, None]
        for i, place in enumerate(places):
            check_bytes(i, place, content)
        assert not disk.transfer.is_direct
    assert caplog.text.count("direct_io=off") == 1, "said once, with the reason"


def cached_pages(path: Path) -> int:
    """Of the file in the page cache. Source: mincore(2)."""
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        flags = (ctypes.c_ubyte * (len(mapped) // 4096 + 1))()
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(len(mapped)), flags)
        del held
        assert not failed
        return sum(flag & 1 for flag in flags)


@LINUX
@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_in_the_page_cache(path: Path, content: bytes, direct: bool) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(path) == 0
    settings = DriveSettings(SMALL_CHUNKS.chunk_bytes, SMALL_CHUNKS.num_workers, direct)
    with opened([path], settings, repack=xor_rows) as disk, Slots(disk) as places:
        assert outcomes(submit_all(disk.transfer, places)) == [None, None, None]
        disk.transfer.read_now(Extent(FileIdx(0), 100_000, 100))
        assert cached_pages(path) == 0


@LINUX
def test_drive_that_returns_less_than_a_block_for_ever(path: Path, content: bytes) -> None:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return min(os.preadv(fd, buffers, offset), 100)

    with opened([path], preadv=preadv) as disk, pytest.raises(ReadFailed, match="too little"):
        disk.transfer.read_now(Extent(FileIdx(0), 0, 5000))


def test_close_while_busy(path: Path, content: bytes) -> None:
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.1)
    with opened([path], repack=xor_rows, preadv=preadv) as disk, Slots(disk) as places:
        handles = submit_all(disk.transfer, places)
        time.sleep(0.02)
        begin = time.perf_counter()
        disk.transfer.close()
        assert time.perf_counter() - begin < 0.5
        assert {type(error) for error in outcomes(handles)} == {Cancelled}
        assert disk.ledger.breakdown().keys() == {"slots"}
        after = disk.transfer.submit(LAYOUTS[0].reads, places[0], "after")
        assert after.is_done and isinstance(outcomes([after])[0], Cancelled)
        with pytest.raises(Cancelled):
            disk.transfer.read_now(Extent(FileIdx(0), 0, 1))


def test_close_while_a_read_is_stuck(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    stuck = threading.Event()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        stuck.wait()
        return os.preadv(fd, buffers, offset)

    with opened([path], repack=xor_rows, preadv=preadv) as disk:
        with Slots(disk) as places:
            handles = submit_all(disk.transfer, places)
            time.sleep(0.02)
            begin = time.perf_counter()
            disk.transfer.close()
            assert time.perf_counter() - begin < CLOSE_S + 0.1
            assert {type(error) for error in outcomes(handles)} == {Cancelled}
            assert "still reading at close" in caplog.text
        # the slots are gone; the late read must not hurt anybody, and the last worker cleans up
        stuck.set()
        while disk.ledger.in_use_bytes:
            time.sleep(0.001)


def test_waiting_threads_wake_up_at_close(path: Path, content: bytes) -> None:
    ended: list[BaseException] = []
    with opened([path], preadv=faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.1)) as disk:

        def read() -> None:
            try:
                disk.transfer.read_rows(
                    [Extent(FileIdx(0), 4096 * i, 10) for i in range(90)], memoryview(bytearray(900))
                )
            except Cancelled as error:
                ended.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        disk.transfer.close()
        for thread in threads:
            thread.join(5)
    assert len(ended) == 3


def test_nothing_writes_to_a_place_once_its_handle_is_done(path: Path, content: bytes) -> None:
    fails = faulty_preadv(Fault.FAIL, 2)

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        try:
            return fails(fd, buffers, offset)
        finally:
            time.sleep(0.02)  # the others are still reading when the second fails

    with opened([path], repack=xor_rows, preadv=preadv) as disk, Slots(disk) as places:
        assert any(outcomes(submit_all(disk.transfer, places)))
        for place in places:
            place.view[:] = bytes(place.num_bytes)
        time.sleep(0.06)
        assert not any(any(place.view) for place in places)


def test_failing_repack_ends_the_transfer(path: Path, content: bytes) -> None:
    def repack(*_: object) -> None:
        raise ComputeError("no kernel for this type")

    with opened([path], repack=repack) as disk, Slots(disk) as places:
        assert {type(error) for error in outcomes(submit_all(disk.transfer, places))} == {ComputeError}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_our_own_bug_in_a_worker_is_not_a_hang(path: Path, content: bytes) -> None:
    def repack(*_: object) -> None:
        raise ZeroDivisionError

    with opened([path], repack=repack) as disk, Slots(disk) as places:
        handles = submit_all(disk.transfer, places)
        with pytest.raises(ZeroDivisionError):
            handles[2].wait(10)


def test_waiting_shorter_than_the_read(path: Path, content: bytes) -> None:
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.05)
    with opened([path], repack=xor_rows, preadv=preadv) as disk, Slots(disk) as places:
        handle = submit_all(disk.transfer, places)[0]
        handle.wait(0)
        assert not handle.is_done and handle.finished_s is None
        handle.wait()
        assert handle.is_done


def test_times_and_bytes_of_a_handle(path: Path, content: bytes) -> None:
    tracer = Tracer()
    with opened([path], repack=xor_rows, tracer=tracer) as disk, Slots(disk) as places:
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
    with opened([path], settings, repack=xor_rows, preadv=preadv) as disk, Slots(disk) as places:
        handles = submit_all(disk.transfer, places)
        outcomes(handles)
        for first, second in ((handles[0], handles[1]), (handles[1], handles[2])):
            assert first.started_s is not None and second.started_s is not None and first.finished_s is not None
            assert first.started_s <= second.started_s <= first.finished_s


def test_rows_go_ahead_of_queued_units(path: Path, content: bytes) -> None:
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.01)
    with opened([path], repack=xor_rows, preadv=preadv) as disk, Slots(disk) as places:
        handles = submit_all(disk.transfer, places)
        assert disk.transfer.read_now(Extent(FileIdx(0), 699_000, 1000)) == content[699_000:]
        assert not handles[-1].is_done
        assert outcomes(handles) == [None, None, None]


def test_closing_twice_is_allowed(path: Path, content: bytes) -> None:
    with opened([path]) as disk:
        disk.transfer.close()


@pytest.fixture
def null_places() -> Iterator[list[Place]]:
    arena = Arena(sum(layout.num_bytes + 4096 for layout in LAYOUTS), name="slots", ledger=Ledger(1 << 30))
    with arena:
        yield [arena.take(layout.num_bytes) for layout in LAYOUTS]


def test_null_transfer_keeps_virtual_time(content: bytes, null_places: list[Place]) -> None:
    clock = VirtualClock()
    transfer = NullTransfer([content], NullDrive(bytes_per_s=230_000), clock=clock, repack=xor_rows)
    handles = submit_all(transfer, null_places)
    assert not handles[0].is_done and set(null_places[0].view[:150_000]) == {0xA5}
    handles[1].wait(0.5)
    assert clock.now() == pytest.approx(0.5) and not handles[0].is_done
    handles[1].wait()
    assert clock.now() == pytest.approx(2.0) and handles[0].is_done and not handles[2].is_done
    check_bytes(0, null_places[0], content)
    check_bytes(1, null_places[1], content)


def test_null_transfer_shuffles_arrivals(content: bytes, null_places: list[Place]) -> None:
    orders = set()
    for seed in range(20):
        drive = NullDrive(bytes_per_s=1e9, max_jitter_s=1.0, seed=seed)
        transfer = NullTransfer([content], drive, clock=VirtualClock(), repack=xor_rows)
        handles = submit_all(transfer, null_places)
        assert outcomes(handles) == [None, None, None]
        orders.add(tuple(sorted(range(3), key=lambda i: handles[i].finished_s or 0.0)))
    assert len(orders) > 2


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_null_transfer_fails_on_demand(content: bytes, null_places: list[Place], nth: int) -> None:
    transfer = NullTransfer([content], NullDrive(fail_nth=nth), clock=VirtualClock(), repack=xor_rows)
    handles = submit_all(transfer, null_places)
    found = outcomes(handles)
    assert found[: nth - 1] == [None] * (nth - 1) and {type(error) for error in found[nth - 1 :]} == {ReadFailed}
    assert outcomes([transfer.submit([Read(Extent(FileIdx(0), 0, 1), 0)], null_places[0], "later")])[0] is found[-1]


def test_null_transfer_ends_at_close(content: bytes, null_places: list[Place]) -> None:
    transfer = NullTransfer([content], NullDrive(), clock=VirtualClock(), repack=xor_rows)
    handle = transfer.submit(LAYOUTS[0].reads, null_places[0], "unit")
    transfer.close()
    assert isinstance(outcomes([handle])[0], Cancelled)
