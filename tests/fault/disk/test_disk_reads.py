"""transfer.disk when reads fail, end early, come short or slowly: every handle ends, errors say what was missing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from pipo.base.errors import ComputeError, PipoError, ReadFailed, UnexpectedEof
from pipo.base.manifest import Extent, FileIdx
from pipo.tiers.ram import Place
from pipo.transfer.disk import DriveSettings
from pipo.transfer.handle import Handle
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.disk_units import LAYOUTS, check_bytes, outcomes, slots, submit_all
from tests.support.transfers import LINUX, SMALL_CHUNKS, Opened, opened, write_random, xor_rows


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
        with slots(disk.ledger) as places:
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


@LINUX
def test_drive_that_returns_less_than_a_block_for_ever(path: Path, content: bytes) -> None:
    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return min(os.preadv(fd, buffers, offset), 100)

    with opened([path], preadv=preadv) as disk, pytest.raises(ReadFailed, match="too little"):
        disk.transfer.read_now(Extent(FileIdx(0), 0, 5000))


def test_failing_repack_ends_the_transfer(path: Path, content: bytes) -> None:
    def repack(*_: object) -> None:
        raise ComputeError("no kernel for this type")

    with opened([path], repack=repack) as disk, slots(disk.ledger) as places:
        assert {type(error) for error in outcomes(submit_all(disk.transfer, places))} == {ComputeError}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_our_own_bug_in_a_worker_is_not_a_hang(path: Path, content: bytes) -> None:
    def repack(*_: object) -> None:
        raise ZeroDivisionError

    with opened([path], repack=repack) as disk, slots(disk.ledger) as places:
        handles = submit_all(disk.transfer, places)
        with pytest.raises(ZeroDivisionError):
            handles[2].wait(10)
