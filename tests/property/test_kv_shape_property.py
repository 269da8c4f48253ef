"""Where keys and values lie, and which of their pages a context does not use yet."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipo.base.tensor_type import TensorType
from pipo.base.units import PAGE_BYTES, round_up
from pipo.kvcache.cache import ROWS_PER_CLASS, ROWS_PER_PAGE, KvCache, KvShape
from pipo.planner.placement import KvPage
from pipo.tiers.ram import Place

types = st.sampled_from([TensorType.F16, TensorType.F32, TensorType.Q8_0, TensorType.Q4_0])
shapes = st.builds(
    KvShape,
    num_layers=st.integers(1, 4),
    kv_size=st.integers(1, 24).map(lambda n: 32 * n),
    num_rows=st.integers(1, 6).map(lambda n: ROWS_PER_CLASS * n),
    type_k=types,
    type_v=types,
    num_sequences=st.integers(1, 5),
)


@given(shapes, st.integers(1, 6 * ROWS_PER_CLASS))
def test_unused_pages_hold_no_row_in_use(shape: KvShape, num_rows: int) -> None:
    num_rows = min(num_rows, shape.num_rows)
    unused = sorted(unused_ranges(shape, [num_rows] * shape.num_sequences))
    assert all(start % PAGE_BYTES == end % PAGE_BYTES == 0 and start < end for start, end in unused)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(unused))
    assert shape.used_bytes(num_rows) == shape.num_bytes - sum(end - start for start, end in unused)
    cache = _cache(shape)
    for block in range(shape.num_layers):
        for sequence in range(shape.num_sequences):
            for address, type_ in (
                (cache.address_k(block, sequence), shape.type_k),
                (cache.address_v(block, sequence), shape.type_v),
            ):
                end = address + num_rows * type_.row_bytes(shape.kv_size)
                assert 0 <= address < end <= shape.num_bytes
                assert all(stop <= address or end <= start for start, stop in unused)


@given(shapes, st.integers(1, 40))
def test_pages_never_take_more_than_is_counted(shape: KvShape, num_pages: int) -> None:
    num_rows = min(num_pages * ROWS_PER_PAGE, shape.num_rows)
    assert shape.used_bytes(num_rows) <= -(-num_rows // ROWS_PER_PAGE) * shape.page_bytes
    assert shape.used_bytes(shape.num_rows) == shape.num_bytes


@given(shapes, st.data(), st.integers(1, 6 * ROWS_PER_CLASS))
def test_layers_that_slide_keep_the_newest_rows(shape: KvShape, data: st.DataObject, num_rows: int) -> None:
    num_rows, kept = min(num_rows, shape.num_rows), data.draw(st.integers(1, 20)) * ROWS_PER_PAGE
    flags = data.draw(st.lists(st.booleans(), min_size=shape.num_layers, max_size=shape.num_layers))
    sliding = replace(shape, num_sequences=1, sliding=tuple(flags), kept_rows=kept)
    unused = list(sliding.unused_ranges(0, num_rows))
    assert sliding.used_bytes(num_rows) == sliding.num_bytes - sum(end - start for start, end in unused)
    cache, row_bytes = _cache(sliding), sliding.type_k.row_bytes(sliding.kv_size)
    for block, slides in enumerate(flags):
        first = max(num_rows - kept, 0) if slides else 0
        begin, end = (cache.address_k(block) + row * row_bytes for row in (first, num_rows))
        assert all(stop <= begin or end <= start for start, stop in unused)
    page = KvPage(
        ROWS_PER_PAGE, sliding.staying.page_bytes, replace(sliding, num_layers=sum(flags)).page_bytes,
        kept // ROWS_PER_PAGE + 2,
    )  # fmt: skip
    num_rows = round_up(num_rows, ROWS_PER_PAGE)
    assert sliding.used_bytes(num_rows) <= page.bytes_at(num_rows)


@given(shapes)
def test_sequences_and_blocks_do_not_overlap(shape: KvShape) -> None:
    cache = _cache(shape)
    spans = []
    for block in range(shape.num_layers):
        for sequence in range(shape.num_sequences):
            k, v = cache.address_k(block, sequence), cache.address_v(block, sequence)
            spans += [(k, k + shape.sequence_bytes_k), (v, v + shape.sequence_bytes_v)]
    spans.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= shape.num_bytes


@given(shapes, st.data())
def test_sequences_grow_apart_within_what_is_counted(shape: KvShape, data: st.DataObject) -> None:
    """A page of the placement is so many rows of every sequence; what one does not use others may."""
    longest = shape.num_rows // ROWS_PER_PAGE
    pages = data.draw(st.lists(st.integers(0, longest), min_size=shape.num_sequences, max_size=shape.num_sequences))
    rows = [num * ROWS_PER_PAGE for num in pages]
    used = shape.used_bytes_of(rows)
    assert used == shape.num_bytes - sum(end - start for start, end in unused_ranges(shape, rows))
    assert used <= shape.used_bytes(max(rows))
    page = KvPage(ROWS_PER_PAGE, shape.page_bytes)
    assert used <= page.bytes_at(max(sum(rows), 1) / len(rows))


def unused_ranges(shape: KvShape, rows: list[int]) -> list[tuple[int, int]]:
    return [each for sequence, num in enumerate(rows) for each in shape.unused_ranges(sequence, num)]


def _cache(shape: KvShape) -> KvCache:
    """At address 0."""
    return KvCache(shape, Place(memoryview(b""), 0, shape.num_bytes), range(shape.num_layers))
