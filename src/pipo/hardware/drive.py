"""How fast the drive under a model delivers, by size of request and number in flight, measured through DiskTransfer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TypeVar

from pipo.base.clock import Clock, RealClock
from pipo.base.manifest import Extent, FileIdx
from pipo.base.tensor_type import ROWS_PER_GROUP, TensorType
from pipo.base.trace import NullTracer
from pipo.base.units import MIB, PAGE_BYTES, round_down
from pipo.store.index import Read, RepackRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Place, SlotPool
from pipo.transfer.disk import DiskTransfer, DriveSettings, Repack
from pipo.transfer.handle import Handle

W = TypeVar("W")
ALL_COMBOS = tuple(DriveSettings(chunk * MIB, workers) for workers in (1, 4, 8, 16) for chunk in (1, 4, 16))
# what a first run can afford in time and memory
QUICK_COMBOS = tuple(DriveSettings(chunk * MIB, workers) for chunk, workers in ((1, 4), (1, 8), (4, 4), (4, 8)))
QUICK_S, FULL_S = 1.5, 12.0
# what `doctor --probe` tries: the whole grid but for the two that would take more than 128 MiB of places
PROBE_COMBOS = tuple(combo for combo in ALL_COMBOS if combo.chunk_bytes * combo.num_workers <= 64 * MIB)
_NUM_ROUNDS = 3
_NUM_SLOTS = 2  # one is read while the next is queued: the drive never waits at a border
_SAME_SPEED = 0.9  # of the fastest; what is closer differs by noise: one probe gave 3.88, 3.76 and 3.70 GB/s for ways
# that a passing minute ranks the other way round
_MAX_GAP_BYTES = MIB  # between extents that are read as one, to keep requests at their size


@dataclass(frozen=True, slots=True)
class DriveRate:
    """What one way of reading gave. `direct` says whether the page cache was out of the way."""

    chunk_bytes: int
    num_workers: int
    bytes_per_s: float
    direct: bool

    @property
    def settings(self) -> DriveSettings:
        return DriveSettings(self.chunk_bytes, self.num_workers, self.direct)


def measure_drive(
    files: Sequence[Path],
    extents: Sequence[Extent] | None = None,
    *,
    combos: Sequence[DriveSettings] = QUICK_COMBOS,
    duration_s: float = QUICK_S,
    clock: Clock | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[DriveRate, ...]:
    """The rate of each combination over `extents` (None: the whole files): the median of interleaved samples.

    A sample goes on where the last one ended, and each round begins with another combination, so that none of them
    meets more bytes than the others which a cache below already holds. `on_progress` hears the fraction done.
    Cost: `duration_s`, more on a drive that needs longer for a sample's last pieces; memory for two pieces of the
    largest combination, 64 MiB for QUICK_COMBOS and 512 MiB for ALL_COMBOS. Raises TransferError.
    """
    walk = _Walk(_whole(files) if extents is None else extents)
    sample_s = duration_s / (len(combos) * _NUM_ROUNDS)
    samples: dict[DriveSettings, list[_Sample]] = {combo: [] for combo in combos}
    largest = max(_piece_bytes(combo) for combo in combos) + 2 * PAGE_BYTES
    with SlotPool([largest] * _NUM_SLOTS, name="slots", ledger=Ledger(_NUM_SLOTS * largest)) as slots:
        _touch(slots.places)
        for round_idx in range(_NUM_ROUNDS):
            for i in range(len(combos)):
                combo = combos[(i + round_idx) % len(combos)]
                sample = _sample(files, walk, combo, slots.places, sample_s, clock or RealClock())
                samples[combo].append(sample)
                on_progress((round_idx * len(combos) + i + 1) / (_NUM_ROUNDS * len(combos)))
    return tuple(_rate(combo, taken) for combo, taken in samples.items())


def measure_repacked_reads(
    files: Sequence[Path],
    settings: DriveSettings,
    repack: Repack,
    type_: TensorType,
    row_elems: int,
    duration_s: float,
) -> float | None:
    """Bytes a second, while the workers repack all they read as rows of this type; None where the files have too few.

    Cost: `duration_s`; memory for two pieces and a chunk per worker. Raises TransferError.
    """
    row_bytes = type_.row_bytes(row_elems)
    walk = _RowsWalk(files, RepackRows(type_, row_bytes, 0, row_elems))
    if not walk.num_rows:
        return None
    piece_bytes = max(_piece_bytes(settings), row_bytes * ROWS_PER_GROUP)
    with SlotPool([piece_bytes] * _NUM_SLOTS, name="slots", ledger=Ledger(_NUM_SLOTS * (piece_bytes + MIB))) as slots:
        _touch(slots.places)
        return _sample(files, walk, settings, slots.places, duration_s, RealClock(), repack).bytes_per_s


def places_fit(settings: DriveSettings, place: Place) -> bool:
    """Whether `measure_beside` can read in this way into it."""
    return place.num_bytes >= _NUM_SLOTS * (_piece_bytes(settings) + 2 * PAGE_BYTES)


def measure_beside(
    files: Sequence[Path], settings: DriveSettings, place: Place, duration_s: float, work: Callable[[], W]
) -> tuple[float, W]:
    """Bytes a second read into `place`, on a thread of its own, while `work` takes as long on this one; and what that
    returns. Raises TransferError.
    """
    each = round_down(place.num_bytes // _NUM_SLOTS, PAGE_BYTES)
    slots = [
        Place(place.view[start : start + each], place.address + start, each)
        for start in range(0, _NUM_SLOTS * each, each)
    ]
    with ThreadPoolExecutor(1) as reader:
        sample = reader.submit(_sample, files, _Walk(_whole(files)), settings, slots, duration_s, RealClock())
        found = work()
        return sample.result().bytes_per_s, found


def measure_read_latency(files: Sequence[Path], settings: DriveSettings, num_reads: int = 40) -> float:
    """Seconds of one read of a page, alone, through the workers: the median. Raises TransferError."""
    ledger, clock = Ledger(settings.bounce_bytes(repacks=False)), RealClock()
    transfer = DiskTransfer(files, settings, repack=None, ledger=ledger, tracer=NullTracer(), clock=clock)
    extents = [e for e in _whole(files) if e.num_bytes]
    try:
        samples = []
        for i in range(num_reads):
            extent = extents[i % len(extents)]
            offset = extent.num_bytes * i // num_reads // PAGE_BYTES * PAGE_BYTES
            begin = clock.now()
            transfer.read_now(Extent(extent.file_idx, offset, min(PAGE_BYTES, extent.num_bytes - offset)))
            samples.append(clock.now() - begin)
        return median(samples)
    finally:
        transfer.close()


def best_rate(rates: Sequence[DriveRate]) -> DriveRate:
    """The fastest; of those as fast but for noise, the one with the most bytes in flight.

    Alone they are alike. Beside compute, whose threads delay the workers, the reserve counts: streaming a 7B in 2 GiB,
    1 MiB × 4 gave 2.3-2.7 GB/s, 4 MiB × 4 2.7 and 4 MiB × 8 2.9 where the drive alone gave 3.1-3.4.
    """
    fastest = max(rate.bytes_per_s for rate in rates)
    alike = [rate for rate in rates if rate.bytes_per_s >= fastest * _SAME_SPEED]
    return max(alike, key=lambda rate: rate.chunk_bytes * rate.num_workers)


@dataclass(frozen=True, slots=True)
class _Sample:
    bytes_per_s: float
    is_direct: bool


class _Walk:
    """Goes through the extents piece by piece, round and round."""

    group_bytes = 0  # nothing is repacked

    def __init__(self, extents: Iterable[Extent]) -> None:
        regions = _merged(extents)
        assert regions, "nothing to read"
        self._regions = cycle(regions)
        self._left = next(self._regions)

    def next_read(self, max_bytes: int) -> Read:
        left = self._left
        piece = Extent(left.file_idx, left.offset, min(max_bytes, left.num_bytes))
        if piece.num_bytes == left.num_bytes:
            self._left = next(self._regions)
        else:
            self._left = Extent(left.file_idx, piece.end, left.num_bytes - piece.num_bytes)
        return Read(piece, piece.offset % PAGE_BYTES)


class _RowsWalk:
    """Goes through the largest file as if it held nothing but rows of one length, round and round."""

    def __init__(self, files: Sequence[Path], rows: RepackRows) -> None:
        largest = max(_whole(files), key=lambda extent: extent.num_bytes)
        self.num_rows = round_down(largest.num_bytes // rows.row_bytes, ROWS_PER_GROUP)
        self.group_bytes = rows.row_bytes * ROWS_PER_GROUP
        self._file_idx, self._rows, self._next = largest.file_idx, rows, 0

    def next_read(self, max_bytes: int) -> Read:
        rows = self._rows
        num_rows = max(round_down(max_bytes // rows.row_bytes, ROWS_PER_GROUP), ROWS_PER_GROUP)
        start, num_rows = self._next, min(num_rows, self.num_rows - self._next)
        self._next = (start + num_rows) % self.num_rows
        extent = Extent(self._file_idx, start * rows.row_bytes, num_rows * rows.row_bytes)
        return Read(extent, 0, replace(rows, num_rows=num_rows))


def _merged(extents: Iterable[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda e: (e.file_idx, e.offset)):
        last = merged[-1] if merged else None
        if last and last.file_idx == extent.file_idx and extent.offset <= last.end + _MAX_GAP_BYTES:
            merged[-1] = Extent(last.file_idx, last.offset, max(last.end, extent.end) - last.offset)
        elif extent.num_bytes:
            merged.append(extent)
    return merged


def _whole(files: Sequence[Path]) -> list[Extent]:
    return [Extent(FileIdx(i), 0, file.stat().st_size) for i, file in enumerate(files)]


def _piece_bytes(combo: DriveSettings) -> int:
    return combo.chunk_bytes * combo.num_workers


def _touch(places: Iterable[Place]) -> None:
    """Take the pages now, or the first sample pays for them."""
    for place in places:
        for offset in range(0, place.num_bytes, PAGE_BYTES):
            place.view[offset] = 0


def _sample(
    files: Sequence[Path],
    walk: _Walk | _RowsWalk,
    combo: DriveSettings,
    places: Sequence[Place],
    seconds: float,
    clock: Clock,
    repack: Repack | None = None,
) -> _Sample:
    """Read pieces for `seconds`, one piece always waiting behind the one that is read."""
    group_bytes = walk.group_bytes
    ledger = Ledger(combo.bounce_bytes(repacks=repack is not None, group_bytes=group_bytes))
    transfer = DiskTransfer(
        files, combo, repack=repack, group_bytes=group_bytes, ledger=ledger, tracer=NullTracer(), clock=clock
    )
    try:
        free, in_flight, num_bytes = deque(places), deque[tuple[Handle, Place]](), 0
        begin = clock.now()
        while in_flight or not num_bytes:
            is_first = not in_flight and not num_bytes
            while free and (is_first or clock.now() - begin < seconds):
                is_first = False
                place = free.popleft()
                read = walk.next_read(_piece_bytes(combo))
                in_flight.append((transfer.submit([read], place, "sample"), place))
            handle, place = in_flight.popleft()
            handle.wait()
            free.append(place)
            num_bytes += handle.num_bytes
        return _Sample(num_bytes / max(clock.now() - begin, 1e-9), transfer.is_direct)
    finally:
        transfer.close()


def _rate(combo: DriveSettings, samples: Sequence[_Sample]) -> DriveRate:
    return DriveRate(
        chunk_bytes=combo.chunk_bytes,
        num_workers=combo.num_workers,
        bytes_per_s=median(sample.bytes_per_s for sample in samples),
        direct=all(sample.is_direct for sample in samples),
    )
