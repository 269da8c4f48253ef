"""Whatever the tensors and wherever they lie: the bytes in the place are the bytes of the file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.base.clock import VirtualClock
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import ROWS_PER_GROUP
from pipo.base.units import PAGE_BYTES, round_up
from pipo.store.index import UnitLayout, cut_rows, layout_unit
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.disk import DriveSettings
from pipo.transfer.null import NullDrive, NullTransfer
from tests.support.transfers import deadline, matrix, opened, write_random, xor_rows, xored

FILE_BYTES = 600_000
GAPS = st.sampled_from([0, 0, 1, 24, 4095, 4096, 4097, 20_000])


@st.composite
def units(draw: st.DrawFn) -> tuple[list[TensorSpec], list[str]]:
    """Tensors that do not overlap, in up to two files, shuffled; and which of them are repacked."""
    tensors: list[TensorSpec] = []
    for file_idx in range(draw(st.integers(1, 2))):
        offset = draw(st.integers(0, 9000))
        for _ in range(draw(st.integers(1, 4))):
            row_bytes = draw(st.integers(1, 3000))
            num_rows = draw(st.integers(1, 40))
            if offset + row_bytes * num_rows > FILE_BYTES:
                break
            tensors.append(matrix(f"t{len(tensors)}", offset, row_bytes, num_rows, file_idx))
            offset = tensors[-1].extent.end + draw(GAPS)
    whole = [t.name for t in tensors if t.shape[1] % ROWS_PER_GROUP == 0]
    repacked = draw(st.lists(st.sampled_from(whole), unique=True)) if whole else []
    return draw(st.permutations(tensors)), repacked


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[bytes]]:
    folder = tmp_path_factory.mktemp("layout")
    paths = [folder / "a", folder / "b"]
    return paths, [write_random(path, FILE_BYTES, seed) for seed, path in enumerate(paths)]


def wanted(tensor: TensorSpec, repacked: list[str], contents: list[bytes]) -> bytes:
    data = contents[tensor.extent.file_idx][tensor.extent.offset : tensor.extent.end]
    return xored(data) if tensor.name in repacked else data


def check(
    tensors: list[TensorSpec], repacked: list[str], layout: UnitLayout, place: Place, contents: list[bytes]
) -> None:
    for tensor in tensors:
        start = layout.offsets[tensor.name]
        assert bytes(place.view[start : start + tensor.num_bytes]) == wanted(tensor, repacked, contents), tensor


@given(units())
def test_layout_keeps_its_promises(unit: tuple[list[TensorSpec], list[str]]) -> None:
    tensors, repacked = unit
    layout = layout_unit(tensors, repacked=repacked)
    owned: list[tuple[int, int]] = []
    for read in layout.reads:
        start, stop = read.place_offset, read.place_offset + read.extent.num_bytes
        if read.rows is None:
            assert start % PAGE_BYTES == read.extent.offset % PAGE_BYTES
            start, stop = start // PAGE_BYTES * PAGE_BYTES, round_up(stop, PAGE_BYTES)
        else:
            assert start % 128 == 0
        owned.append((start, stop))
    owned.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(owned)), "reads share memory"
    assert owned[-1][1] <= layout.num_bytes
    useful = sum(t.num_bytes for t in tensors)
    assert layout.num_bytes <= useful + len(tensors) * 3 * PAGE_BYTES


@given(
    units(),
    st.sampled_from([4096, 8192, 65536]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_bytes_arrive_where_the_layout_says(
    files: tuple[list[Path], list[bytes]],
    unit: tuple[list[TensorSpec], list[str]],
    chunk_bytes: int,
    direct: bool,
) -> None:
    paths, contents = files
    tensors, repacked = unit
    group_bytes = max((8 * t.shape[0] for t in tensors if t.name in repacked), default=0)
    layout = layout_unit(tensors, repacked=repacked)
    with (
        deadline(10),
        opened(paths, DriveSettings(chunk_bytes, 3, direct), repack=xor_rows, group_bytes=group_bytes) as disk,
    ):
        held = disk.ledger.in_use_bytes
        with Arena(layout.num_bytes, name="slot", ledger=disk.ledger) as arena:
            place = arena.take(layout.num_bytes)
            handle = disk.transfer.submit(layout.reads, place, "unit")
            handle.wait()
            check(tensors, repacked, layout, place, contents)
            assert handle.num_bytes <= handle.read_bytes
        assert disk.ledger.in_use_bytes == held
    assert disk.ledger.in_use_bytes == 0


@given(st.lists(units(), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_null_drive_delivers_the_same_in_any_order(
    files: tuple[list[Path], list[bytes]], batch: list[tuple[list[TensorSpec], list[str]]], seed: int
) -> None:
    contents, clock = files[1], VirtualClock()
    transfer = NullTransfer(contents, NullDrive(1e6, max_jitter_s=1.0, seed=seed), clock=clock, repack=xor_rows)
    ledger = Ledger(1 << 30)
    waiting = []
    for tensors, repacked in batch:
        layout = layout_unit(tensors, repacked=repacked)
        place = Arena(layout.num_bytes, name="slot", ledger=ledger).take(layout.num_bytes)
        waiting.append((transfer.submit(layout.reads, place, "unit"), tensors, repacked, layout, place))
    for handle, *unit, place in reversed(waiting):
        handle.wait()
        assert handle.is_done and handle.finished_s is not None and handle.finished_s <= clock.now()
        check(*unit, place, contents)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 500_000), st.integers(0, 90_000)), max_size=20))
@settings(max_examples=60, deadline=None)
def test_rows_arrive_one_after_another(files: tuple[list[Path], list[bytes]], rows: list[tuple[int, int, int]]) -> None:
    paths, contents = files
    extents = [Extent(FileIdx(f), offset, size) for f, offset, size in rows]
    out = bytearray(sum(e.num_bytes for e in extents))
    with deadline(10), opened(paths) as disk:
        disk.transfer.submit_rows(extents, memoryview(out)).wait()
        assert bytes(out) == b"".join(contents[e.file_idx][e.offset : e.end] for e in extents)
        assert all(disk.transfer.read_now(e) == contents[e.file_idx][e.offset : e.end] for e in extents[:2])


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 30_000), st.integers(1, 16))
def test_cut_rows_covers_the_matrix_once(row_bytes: int, num_rows: int, max_bytes: int, multiple: int) -> None:
    whole = matrix("output.weight", 1000, row_bytes, num_rows)
    pieces = cut_rows(whole, max_bytes, multiple)
    assert pieces[0].extent.offset == 1000 and pieces[-1].extent.end == whole.extent.end
    assert all(a.extent.end == b.extent.offset for a, b in pairwise(pieces))
    assert sum(p.shape[1] for p in pieces) == num_rows and all(p.shape[0] == row_bytes for p in pieces)
    assert all(p.shape[1] % multiple == 0 for p in pieces[:-1])
    assert all(p.num_bytes <= max(max_bytes, multiple * row_bytes) for p in pieces)
