"""Which tokens of a pass share an attention, and that memory is planned for whatever comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.random_model import write_random_model
from pipo.base.config import EngineConfig
from pipo.kvcache.cache import ROWS_PER_CLASS
from pipo.models.stage import ShapeClass
from pipo.pipeline.spans import MAX_GROUPS, PassRows, Span, passes_of
from pipo.pipeline.stage_graphs import StageGraphs
from tests.support.random_adapters import write_random_adapter
from tests.support.rigs import Rig
from tests.support.tiny_models import SPECS, make_model, write_gguf


def singles(*where: tuple[int, int]) -> list[Span]:
    """Of these sequences, at these positions."""
    return [Span(sequence, start, [5], True) for sequence, start in where]


def groups(spans: list[Span]) -> list[tuple[int, int, int]]:
    """First sequence, number of sequences, KV rows."""
    return [(group.first, group.num_sequences, group.num_kv_rows) for group in PassRows.of(spans).groups]


def test_neighbours_share_an_attention_across_holes_and_classes() -> None:
    assert groups(singles((3, 10), (1, 300), (2, 40))) == [(1, 3, 512)]
    assert groups(singles((0, 10), (4, 10))) == [(0, 5, 256)]


def test_what_would_pass_over_too_many_rows_is_apart() -> None:
    """A long sequence among short ones, and two that are far from each other."""
    assert groups(singles((0, 10), (1, 20), (2, 8000), (3, 10))) == [(0, 2, 256), (2, 1, 8192), (3, 1, 256)]
    assert groups(singles((0, 10), (9, 10))) == [(0, 1, 256), (9, 1, 256)]


def test_there_are_never_more_groups_than_graphs_have_room_for() -> None:
    """However much they would pass over: the cheapest go together."""
    spans = singles(*((i, 8000 if i % 2 else 10) for i in range(40)))
    longer = [Span(40 + i, 0, [5, 6], False) for i in range(5)]
    assert len(PassRows.of(spans).groups) <= MAX_GROUPS
    assert 6 <= len(PassRows.of([*spans, *longer]).groups) <= MAX_GROUPS
    passes = passes_of([*longer, *[Span(50 + i, 0, [7] * 3, True) for i in range(4)], *spans])
    assert [len(each) for each in passes] == [40 + MAX_GROUPS - 1, 2]
    assert len(passes_of([*spans, *longer], 1)) == 6 and len(passes_of(longer, 1)) == 5


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3000), st.integers(1, 6)), min_size=1, max_size=15))
def test_every_token_is_there_once(drawn: list[tuple[int, int, int]]) -> None:
    chosen = {each[0]: each for each in drawn}.values()
    spans = [Span(sequence, start, list(range(num)), True) for sequence, start, num in chosen]
    for rows in (PassRows.of(each) for each in passes_of(spans)):
        where = [(span.sequence, group.first, group.num_sequences) for group in rows.groups for span in group.spans]
        assert all(first <= sequence < first + num for sequence, first, num in where)
        assert rows.num_tokens == len(rows.token_ids) and len(rows.groups) <= MAX_GROUPS
        assert rows.num_apart == (sum(span.num_tokens == 1 for span in rows.spans) if rows.num_tokens > 1 else 0)
        assert all(group.num_kv_rows >= span.end for group in rows.groups for span in group.spans)
        assert all(group.num_kv_rows % ROWS_PER_CLASS == 0 for group in rows.groups)
    found = [span for each in passes_of(spans) for span in PassRows.of(each).spans]
    assert sorted(span.sequence for span in found) == sorted(span.sequence for span in spans)


@pytest.mark.parametrize("name", ["llama-wide-heads", "gemma2", "phi3-sliding", "opt", "gpt-oss", "smoke"])
def test_no_mixed_pass_takes_more_than_the_largest(name: str, tmp_path: Path) -> None:
    """Intermediates of its graphs, adapters included: there is room for those of `Blueprint.largest_shapes`."""
    path, chunk, num_sequences = tmp_path / "model.gguf", 40, 9
    if name == "smoke":
        write_random_model(path, "smoke", "q4_0")
    else:
        write_gguf(make_model(SPECS[name]), path)
    config = EngineConfig(threads=2, prefill_chunk=chunk, num_sequences=num_sequences)
    with Rig(path, config, context_tokens=256) as plain:
        adapters = [write_random_adapter(path, tmp_path / f"{i}.gguf", rank=4, seed=i) for i in range(2)]
        plan = plain.with_adapters(*adapters).blueprint
        graphs = StageGraphs(plan.compute, plan.manifest.hyper, plan.layouts)
        room = graphs.measure(plan.stages, plan.largest_shapes(256, chunk), plan.adapters)
        rng = np.random.default_rng(4)
        for _ in range(40):
            rows, kv = PassRows.of(_random_spans(rng, chunk, num_sequences)), plan.kv_shape(256)
            shape = ShapeClass(
                rows.num_tokens, tuple(group.shape(kv.num_rows) for group in rows.groups),
                int(rng.integers(1, num_sequences + 1)), kv.type_k, kv.type_v, rows.num_apart,
            )  # fmt: skip
            assert graphs.measure(plan.stages, [shape], plan.adapters) <= room, rows
        graphs.close()


def _random_spans(rng: np.random.Generator, left: int, num_sequences: int) -> list[Span]:
    """Of up to MAX_GROUPS sequences, which fill the chunk as often as not."""
    spans = []
    for sequence in rng.permutation(num_sequences)[: rng.integers(1, MAX_GROUPS)].tolist():
        if not left:
            break
        num = 1 if rng.random() < 0.5 else int(rng.integers(1, left + 1))
        spans.append(Span(sequence, 0, [5] * num, True))
        left -= num
    return spans
