"""Templates that never end or want all memory: bounded row by row, and refused where it is not one row alone."""

from __future__ import annotations

import resource
import signal
from functools import partial
from pathlib import Path

import pytest

from bench.random_model import write_random_model
from pipo.base.errors import UsageError
from pipo.base.units import MIB
from pipo.jobs import preparation
from pipo.jobs.answers import Answer
from pipo.jobs.bounds import row_bounds
from pipo.jobs.preparation import MAX_TOO_MUCH, Prepared, Preparer
from pipo.jobs.prompts import PromptSettings, PromptSource
from pipo.jobs.table import Contents
from pipo.model_file import ModelFile
from pipo.text.prompt_template import PromptTemplate
from tests.support.batches import GREEDY

LOOPS = "{% set l = range(99999)|list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
DOUBLING = (
    "{% set ns = namespace(l=[1]) %}{% for i in range(31) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|length }}"
)
PADDING = ("{{ a|center(2000000000) }}", "{{ a|indent(2000000000) }}", "{{ '%2000000000d' % 3 }}")


@pytest.mark.parametrize("source", [LOOPS, CALLS])
def test_a_template_without_end_is_ended(source: str) -> None:
    with pytest.raises(TimeoutError), row_bounds(seconds=0.1):
        PromptTemplate(source).render({})
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


@pytest.mark.parametrize("source", [DOUBLING, *PADDING, "{{ a.ljust(2000000000) }}"])
def test_a_template_that_wants_all_memory_does_not_get_it(source: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), row_bounds(seconds=60, num_bytes=64 * MIB):
        PromptTemplate(source).render({"a": "text"})
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


@pytest.mark.parametrize("source", [padding.replace("a|", "'a'|") for padding in PADDING])
def test_nothing_is_computed_while_a_template_is_compiled(source: str) -> None:
    """The process that compiles it first is the job's own, where nothing bounds it."""
    with row_bounds(seconds=60, num_bytes=64 * MIB):
        PromptTemplate(source)


def test_other_work_is_not_in_the_way() -> None:
    with row_bounds(seconds=0.1):
        text = PromptTemplate("{{ a }}").render({"a": "x" * 1_000_000})
    assert len(text) == 1_000_000


@pytest.mark.parametrize(
    ("bounds", "source", "says"),
    [
        ({"seconds": 0.1}, "{% if a %}" + LOOPS + "{% endif %}fine", "takes more than 2 s of computing"),
        ({"num_bytes": 64 * MIB}, "{{ ('a'|center(2000000000 if a else 1)) }}", "takes more than 256 MiB"),
    ],
)
def test_a_row_fails_alone_and_a_template_that_goes_on_so_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, float], source: str, says: str
) -> None:
    write_random_model(tmp_path / "smoke.gguf", "smoke", "q4_0")
    prompts = PromptSource(PromptSettings(GREEDY, source, is_raw=True), Contents(("a",), 9, {}))
    preparer = Preparer(ModelFile(tmp_path / "smoke.gguf"), prompts, 64)
    monkeypatch.setattr(preparation, "row_bounds", partial(row_bounds, **bounds))
    for idx in range(MAX_TOO_MUCH - 1):
        failed = preparer.prepare(idx, {"a": 1})
        assert isinstance(failed, Answer) and says in (failed.error or "")
        assert isinstance(preparer.prepare(idx, {"a": 0}), Prepared)
    with pytest.raises(UsageError, match=f"{says} for a row, and this is row number {MAX_TOO_MUCH}"):
        preparer.prepare(8, {"a": 1})
