"""Is the budget kept? Peak anonymous memory, seen from outside and by the engine, inside a limit just above it."""

from __future__ import annotations

from collections.abc import Iterator

from bench.child import ChildFailed
from bench.lab import Lab, Running
from bench.messages import Decode, PipoSetup, Prefill
from bench.model_files import drop_cached
from bench.page_cache import cached_bytes
from bench.rows import Row, at_most, row, skipped
from pipo.base.units import MIB, format_size

MOST_CACHED_BYTES = 32 * MIB
_POINTS = (0.0, 0.33, 0.67, 1.0)  # from the smallest budget to all resident


def measure(lab: Lab) -> Iterator[Row]:
    roomy = lab.plan(lab.setup(lab.roomy_bytes))
    smallest = lab.plan(lab.setup(MIB)).smallest_bytes
    if (reason := lab.reason_against_limits) is not None:
        yield skipped("survives its limit", "pipo", reason)
    for point in _POINTS:
        yield from _at(lab, lab.setup(smallest + int((roomy.needed_bytes - smallest) * point)))


def _at(lab: Lab, setup: PipoSetup) -> Iterator[Row]:
    ram = format_size(setup.ram_bytes)
    drop_cached(lab.path)
    try:
        running = lab.start_pipo(setup, is_limited=lab.reason_against_limits is None)
        prefill = running.child.ask(Prefill(lab.settings.prompt_tokens, seed=1))
        decode = running.child.ask(Decode(lab.settings.passes))
    except ChildFailed as failure:
        yield row("budgets not survived", f"pipo --ram {ram}", "", [1], at_most(0), note=str(failure))
        return
    limit = at_most(setup.ram_bytes / MIB)
    own_peak = max(prefill.peak_anonymous_bytes, decode.peak_anonymous_bytes)
    note = _group_text(running)
    yield row("peak anonymous, from outside", f"pipo --ram {ram}", "MiB",
              [running.child.peak_anonymous_bytes / MIB], limit, note)  # fmt: skip
    yield row("peak anonymous, its own count", f"pipo --ram {ram}", "MiB", [own_peak / MIB], limit)
    yield row("model in the page cache", f"pipo --ram {ram}", "MiB", [cached_bytes(lab.path) / MIB],
              at_most(MOST_CACHED_BYTES / MIB))  # fmt: skip
    if running.group is not None:
        cached = running.group.cache_bytes / MIB
        yield row("page cache of its group", f"pipo --ram {ram}", "MiB", [cached], at_most(MOST_CACHED_BYTES / MIB))
    running.child.close()


def _group_text(running: Running) -> str:
    if running.group is None:
        return "no limit"
    group = running.group
    return f"survived a limit of {format_size(group.limit_bytes)}, reclaimed {group.num_refusals} times"
