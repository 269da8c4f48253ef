"""Is the budget kept? Peak anonymous memory, seen from outside and by the engine, inside a limit just above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.anonymous_peak import AnonymousPeak
from bench.cgroup import Cgroup
from bench.child import ChildFailed
from bench.lab import Lab
from bench.messages import Decode, PipoSetup, Prefill, Start
from bench.model_files import drop_cached
from bench.page_cache import cached_bytes
from bench.rows import Row, at_least, at_most, row, skipped
from pipo.base.units import MIB, format_size

MOST_CACHED_BYTES = 32 * MIB
_POINTS = (0.0, 0.33, 0.67, 1.0)  # from the smallest budget to all resident


@dataclass(frozen=True, slots=True)
class _Lived:
    """What was seen of an engine that answered a request and lived."""

    peak_bytes: int
    own_peak_bytes: int
    group_cache_bytes: int | None
    num_reclaims: int


def measure(lab: Lab) -> Iterator[Row]:
    roomy = lab.plan(lab.setup(lab.roomy_bytes))
    smallest = lab.plan(lab.setup(MIB)).smallest_bytes
    for point in _POINTS:
        setup = lab.setup(smallest + int((roomy.needed_bytes - smallest) * point))
        name = f"--ram {format_size(setup.ram_bytes)}"
        try:
            lived = _live(lab, setup)
        except ChildFailed as failure:
            yield row("survived", name, "", [0], at_least(1), note=str(failure))
            continue
        yield from _rows(lab, setup, name, lived)


def _live(lab: Lab, setup: PipoSetup) -> _Lived:
    """One request in a fresh process. Raises ChildFailed."""
    drop_cached(lab.path)
    child, group = lab.open_limited(setup)
    with child, AnonymousPeak(child.pid) as peak:
        child.ask(Start(setup))
        prefill = child.ask(Prefill(lab.settings.prompt_tokens, seed=1))
        decode = child.ask(Decode(lab.settings.passes))
        own_peak_bytes = max(prefill.peak_anonymous_bytes, decode.peak_anonymous_bytes)
        return _Lived(peak.peak_bytes, own_peak_bytes, *_seen_of(group))


def _seen_of(group: Cgroup | None) -> tuple[int | None, int]:
    return (None, 0) if group is None else (group.cache_bytes, group.num_reclaims)


def _rows(lab: Lab, setup: PipoSetup, name: str, lived: _Lived) -> Iterator[Row]:
    budget, most_cached = at_most(setup.ram_bytes / MIB), at_most(MOST_CACHED_BYTES / MIB)
    reason = lab.reason_against_limits
    if reason is not None:
        yield skipped("survived", name, reason)
    else:
        yield row("survived", name, "", [1], at_least(1), note=f"reclaimed {lived.num_reclaims} times")
    if lived.peak_bytes:  # nothing is seen without /proc
        yield row("peak anonymous, from outside", name, "MiB", [lived.peak_bytes / MIB], budget)
    yield row("peak anonymous, its own count", name, "MiB", [lived.own_peak_bytes / MIB], budget)
    yield row("model in the page cache", name, "MiB", [cached_bytes(lab.path) / MIB], most_cached)
    if lived.group_cache_bytes is not None:
        yield row("page cache of its group", name, "MiB", [lived.group_cache_bytes / MIB], most_cached)
