"""Whatever the shapes, types and limits: rows are cut once each, workspaces hold them, and budgets are kept."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.base.errors import OverBudget
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.base.units import PAGE_BYTES
from pipo.formats.gguf_writer import tensor_offsets
from pipo.packing.convert import group_rows, groups_of, workspace_sizes
from pipo.packing.memory import fit_memory
from pipo.packing.types import MIXES, TensorPlan, fitting, plan_tensor

SOURCES = [*dict.fromkeys(mix.type for mix in MIXES.values()), TensorType.IQ3_S, TensorType.MXFP4]


@st.composite
def plans(draw: st.DrawFn) -> TensorPlan:
    source = draw(st.sampled_from(SOURCES))
    row = draw(st.integers(1, 40)) * source.block_elems
    shape = (row, *draw(st.lists(st.integers(1, 60), min_size=0, max_size=2)))
    name = draw(st.sampled_from(["blk.7.attn_v.weight", "blk.1.attn_q.weight", "output.weight"]))
    spec = TensorSpec(name, source, shape, Extent(FileIdx(0), 0, source.nbytes(shape)))
    return plan_tensor(spec, draw(st.sampled_from([*MIXES.values()])), 8, moves=draw(st.booleans()))


@given(plans())
def test_a_type_always_fits_the_rows(plan: TensorPlan) -> None:
    assert plan.row_elems % plan.type.block_elems == 0
    assert plan.num_bytes == plan.num_rows * plan.row_bytes
    assert plan.num_elems == prod(plan.source.shape)
    assert plan.type in (plan.wanted, fitting(plan.wanted, plan.row_elems))


@given(st.lists(plans(), min_size=1, max_size=4), st.integers(1, 1 << 20))
def test_groups_cover_every_row_once_and_fit_the_workspace(tensors: list[TensorPlan], group_bytes: int) -> None:
    sizes = workspace_sizes(tensors, group_bytes)
    for tensor in tensors:
        groups = list(groups_of(tensor, group_bytes))
        ends = [group.start + group.num_rows for group in groups]
        assert groups[0].start == 0 and ends[-1] == tensor.num_rows
        assert all(after.start == end for end, (_, after) in zip(ends, pairwise(groups), strict=False))
        assert max(group.num_rows for group in groups) <= group_rows(tensor, group_bytes)
        for group in groups:  # wherever in a page its bytes begin
            assert group.num_rows * tensor.source_row_bytes + 2 * PAGE_BYTES <= sizes.raw
            if tensor.is_copied:
                continue
            if tensor.source.type is not TensorType.F32:
                assert group.num_rows * tensor.row_elems * 4 <= sizes.floats
            if tensor.type is not TensorType.F32:
                assert group.num_rows * tensor.row_bytes <= sizes.out


@given(st.lists(plans(), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 1 << 24), st.integers(0, 1 << 28))
def test_a_budget_is_kept_or_refused_with_the_smallest(
    tensors: list[TensorPlan], threads: int, header_bytes: int, limit_bytes: int
) -> None:
    try:
        memory = fit_memory(tensors, header_bytes, limit_bytes, threads, process_bytes=1 << 24)
        assert memory.num_bytes <= limit_bytes and memory.num_workers <= threads
    except OverBudget as refused:
        assert refused.smallest_bytes is not None and refused.smallest_bytes > limit_bytes
        smallest = fit_memory(tensors, header_bytes, refused.smallest_bytes, threads, process_bytes=1 << 24)
        assert smallest.num_bytes <= refused.smallest_bytes
        with pytest.raises(OverBudget):
            fit_memory(tensors, header_bytes, refused.smallest_bytes - 1, threads, process_bytes=1 << 24)


@given(st.lists(st.integers(0, 1 << 40)), st.sampled_from([8, 32, 4096]))
def test_offsets_are_those_that_llama_cpp_demands(sizes: list[int], alignment: int) -> None:
    offsets = tensor_offsets(sizes, alignment)
    assert offsets[0] == 0 and all(offset % alignment == 0 for offset in offsets)
    for size, (offset, after) in zip(sizes, pairwise(offsets), strict=True):
        assert 0 <= after - offset - size < alignment
