"""Three units of one file, and the reads that fill their places: submitted, awaited, checked against the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipo.base.errors import PipoError
from pipo.store.index import UnitLayout, layout_unit
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.disk import DiskTransfer
from pipo.transfer.handle import Handle
from pipo.transfer.null import NullTransfer
from tests.support.transfers import matrix, xored

FILE_BYTES = 700_000
# per unit: three plain chunks in one read, and two repacked chunks, of 64 KiB
UNITS = [
    [matrix(f"a{i}", 200 * i + start, 1000, 150), matrix(f"b{i}", 200 * i + start + 150_000, 1000, 80)]
    for i, start in enumerate((0, 231_000, 462_000))
]
LAYOUTS = [layout_unit(unit, repacked=[unit[1].name]) for unit in UNITS]
READS_PER_UNIT = 5


@contextmanager
def slots(ledger: Ledger) -> Iterator[list[Place]]:
    """A place per unit of UNITS."""
    with Arena(sum(layout.num_bytes + 4096 for layout in LAYOUTS), name="slots", ledger=ledger) as arena:
        yield [arena.take(layout.num_bytes) for layout in LAYOUTS]


def submit_all(transfer: DiskTransfer | NullTransfer, places: Sequence[Place]) -> list[Handle]:
    return [
        transfer.submit(layout.reads, place, f"unit {i}")
        for i, (layout, place) in enumerate(zip(LAYOUTS, places, strict=True))
    ]


def outcomes(handles: Sequence[Handle]) -> list[BaseException | None]:
    """How each ended: None, or the error that waiting for it raised."""
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
    """The unit's tensors, one as in the file and one repacked."""
    layout: UnitLayout = LAYOUTS[unit_idx]
    for tensor, repacked in zip(UNITS[unit_idx], (False, True), strict=True):
        start = layout.offsets[tensor.name]
        wanted = content[tensor.extent.offset : tensor.extent.end]
        assert bytes(place.view[start : start + tensor.num_bytes]) == (xored(wanted) if repacked else wanted)
