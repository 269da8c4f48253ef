"""transfer.null keeps the promises of transfer.disk, on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipo.base.clock import VirtualClock
from pipo.base.errors import Cancelled, ReadFailed
from pipo.base.manifest import Extent, FileIdx
from pipo.store.index import Read
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Place
from pipo.transfer.null import NullDrive, NullTransfer
from tests.support.disk_units import LAYOUTS, check_bytes, outcomes, slots, submit_all
from tests.support.transfers import xor_rows


@pytest.fixture
def null_places() -> Iterator[list[Place]]:
    with slots(Ledger(1 << 30)) as places:
        yield places


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
