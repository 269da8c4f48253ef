"""Closing transfer.disk: waiters wake up, a stuck read holds nobody up, and nothing is written afterwards."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipo.base.errors import Cancelled
from pipo.base.manifest import Extent, FileIdx
from pipo.transfer.disk import CLOSE_S, WORKER_NICENESS
from pipo.transfer.null import Fault, faulty_preadv
from tests.support.disk_units import LAYOUTS, outcomes, slots, submit_all
from tests.support.transfers import opened, xor_rows


def test_close_while_busy(path: Path, content: bytes) -> None:
    preadv = faulty_preadv(Fault.SLOW, 1, for_ever=True, delay_s=0.1)
    with opened([path], repack=xor_rows, preadv=preadv) as disk, slots(disk.ledger) as places:
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
        with slots(disk.ledger) as places:
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
                disk.transfer.submit_rows(
                    [Extent(FileIdx(0), 4096 * i, 10) for i in range(90)], memoryview(bytearray(900))
                ).wait()
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

    with opened([path], repack=xor_rows, preadv=preadv) as disk, slots(disk.ledger) as places:
        assert any(outcomes(submit_all(disk.transfer, places)))
        for place in places:
            place.view[:] = bytes(place.num_bytes)
        time.sleep(0.06)
        assert not any(any(place.view) for place in places)


def test_closing_twice_is_allowed(path: Path, content: bytes) -> None:
    with opened([path]) as disk:
        disk.transfer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities are per thread on Linux only")
@pytest.mark.parametrize("started_at", [0, 10, 18])
def test_workers_are_nicer_than_the_program(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, started_at: int
) -> None:
    """Also under `nice`: a thread that asked for less than it has would need a privilege."""
    asked: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda which, who: started_at)
    monkeypatch.setattr(os, "setpriority", lambda which, who, niceness: asked.append(niceness))
    with opened([path]) as disk:
        assert disk.transfer.read_now(Extent(FileIdx(0), 0, 10)) == content[:10]
    assert set(asked) == {min(started_at + WORKER_NICENESS, 19)}


def test_workers_work_where_priorities_are_forbidden(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(errno.EACCES, "forbidden")

    monkeypatch.setattr(os, "setpriority", refuse)
    with opened([path]) as disk:
        assert disk.transfer.read_now(Extent(FileIdx(0), 0, 10)) == content[:10]
