"""store.index on units as they look in real files."""

from __future__ import annotations

import pytest

from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.store.index import Read, RepackRows, UnitLayout, cut_rows, layout_unit
from tests.support.transfers import matrix


def q4_0(name: str, offset: int, num_inputs: int, num_rows: int) -> TensorSpec:
    size = TensorType.Q4_0.nbytes((num_inputs, num_rows))
    return TensorSpec(name, TensorType.Q4_0, (num_inputs, num_rows), Extent(FileIdx(0), offset, size))


def test_tensors_side_by_side_are_one_read() -> None:
    up, down = matrix("up", 10_000, 100, 80), matrix("down", 18_016, 100, 80)
    layout = layout_unit([down, up])
    assert layout == UnitLayout(
        num_bytes=20480,
        reads=(Read(Extent(FileIdx(0), 10_000, 16_016), 10_000 % 4096),),
        offsets={"up": 1808, "down": 1808 + 8016},
    )


@pytest.mark.parametrize(("gap", "num_reads"), [(0, 1), (31, 1), (4096, 1), (4097, 2)])
def test_how_far_apart_two_reads_are(gap: int, num_reads: int) -> None:
    layout = layout_unit([matrix("a", 0, 100, 10), matrix("b", 1000 + gap, 100, 10)])
    assert len(layout.reads) == num_reads


def test_files_never_mix() -> None:
    layout = layout_unit([matrix("a", 0, 100, 10, file_idx=1), matrix("b", 1000, 100, 10, file_idx=0)])
    assert [read.extent.file_idx for read in layout.reads] == [0, 1]
    assert layout.offsets == {"b": 1000, "a": 4096}


def test_repacked_tensors_come_last_exact_and_aligned() -> None:
    gate, up = q4_0("gate", 1000, 64, 16), q4_0("up", 1576, 64, 16)
    layout = layout_unit([gate, up, matrix("norm", 2152, 10, 1)], repacked={"gate", "up"})
    rows = RepackRows(TensorType.Q4_0, row_bytes=36, num_rows=16, row_elems=64)
    assert layout.offsets == {"norm": 2152, "gate": 4096, "up": 4096 + 640}
    assert layout.num_bytes == 4096 + 640 + 576
    assert layout.reads[:2] == (Read(gate.extent, 4096, rows), Read(up.extent, 4736, rows))


def test_two_names_for_one_tensor_share_its_bytes() -> None:
    layout = layout_unit([matrix("a", 100, 100, 10), matrix("b", 100, 100, 10)])
    assert layout.offsets == {"a": 100, "b": 100} and layout.reads[0].extent.num_bytes == 1000


def test_a_unit_without_tensors_needs_nothing() -> None:
    assert layout_unit([]) == UnitLayout(0, (), {})


def test_cut_names_and_extents() -> None:
    head = q4_0("output.weight", 7, 64, 40)
    pieces = cut_rows(head, max_bytes=16 * 36 + 35, multiple=8)
    assert [p.name for p in pieces] == ["output.weight[0:16]", "output.weight[16:32]", "output.weight[32:40]"]
    assert [p.shape for p in pieces] == [(64, 16), (64, 16), (64, 8)]
    assert pieces[1].extent == Extent(FileIdx(0), 7 + 16 * 36, 16 * 36)


def test_pieces_are_even() -> None:
    pieces = cut_rows(matrix("output.weight", 0, 10, 1000), max_bytes=9990, multiple=8)
    assert [p.shape[1] for p in pieces] == [504, 496]


def test_what_fits_is_not_cut() -> None:
    head = matrix("output.weight", 0, 10, 1000)
    assert cut_rows(head, 10_000, 8) == [head]
