"""Does a model larger than its budget run at the speed of the drive? And how far ahead of a mapped file is that?

In one run, interleaved: passes that stream, passes of the same engine with all weights resident (its compute alone),
the raw drive, and llama.cpp over a mapped file inside the same memory limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.child import ChildFailed
from bench.lab import Lab, Running, peers
from bench.messages import Decode, Passes, PipoSetup, PlanFacts
from bench.model_files import drop_cached
from bench.raw_drive import RawDrive
from bench.rows import Row, at_least, at_most, row, skipped
from pipo.base.units import MIB, format_size

MOST_OVER_FLOOR = 1.10  # of a pass, against the slower of drive and compute
LEAST_AHEAD = 2.3  # of llama.cpp in the same limit
PEER = "llama.cpp mapped"


@dataclass(slots=True)
class _Samples:
    """What the rounds gave, by subject."""

    pipo: list[Passes] = field(default_factory=list)
    resident: list[Passes] = field(default_factory=list)
    peer: list[Passes] = field(default_factory=list)
    peer_failure: str = ""


def measure(lab: Lab) -> Iterator[Row]:
    setup = lab.answering(lab.tight_bytes())
    facts = lab.plan(setup)
    yield skipped("plan", "pipo", _plan_text(setup.ram_bytes, facts))
    like = lab.resident_like(facts)
    drive = lab.open_drive(facts)
    drop_cached(lab.path)
    drive.sweep("before")
    streaming = lab.start_limited(setup)
    resident = lab.start_pipo(like)
    samples = _Samples()
    peer = _start_peer(lab, setup.ram_bytes, samples)
    _run_rounds(lab, drive, streaming, resident, peer, samples)
    drive.sweep("after")
    yield from drive.rows()
    yield from _own_rows(facts, drive.bytes_per_s, samples, _compute_note(lab, like, facts))
    yield from _peer_rows(facts, setup.ram_bytes, drive.bytes_per_s, samples)
    peak_bytes = max(each.peak_anonymous_bytes for each in samples.pipo)
    yield row("peak anonymous", "pipo streaming", "MiB", [peak_bytes / MIB], at_most(setup.ram_bytes / MIB))


def _plan_text(ram_bytes: int, facts: PlanFacts) -> str:
    drive = facts.drive
    assert drive is not None
    return (
        f"--ram {format_size(ram_bytes)}: {format_size(facts.resident_bytes)} resident, "
        f"{format_size(facts.streamed_bytes)} per pass, chunk {facts.chunk_tokens}, "
        f"repacked {', '.join(facts.repacked_types) or 'none'}, reads {drive.chunk_bytes // MIB} MiB × "
        f"{drive.num_workers}"
    )


def _compute_note(lab: Lab, like: PipoSetup, facts: PlanFacts) -> str:
    are_same = lab.plan(like).repacked_types == facts.repacked_types
    return f"compute, no transfers: {'the same' if are_same else 'OTHER'} kernels"


def _start_peer(lab: Lab, ram_bytes: int, samples: _Samples) -> Running | None:
    samples.peer_failure = lab.reason_against_limits or ("" if "xllamacpp" in peers(lab.settings) else "not installed")
    if samples.peer_failure:
        return None
    try:
        return lab.start_llama("xllamacpp", limit_for=ram_bytes)
    except ChildFailed as failure:
        samples.peer_failure = str(failure)
        return None


def _run_rounds(
    lab: Lab, drive: RawDrive, streaming: Running, resident: Running, peer: Running | None, samples: _Samples
) -> None:
    """One unmeasured piece of work each (it loads and warms), then rounds."""
    work = Decode(lab.settings.passes)
    for round_idx in range(lab.settings.rounds + 1):
        taken = streaming.child.ask(work), resident.child.ask(work), _ask_peer(peer, work, samples)
        if not round_idx:
            continue
        samples.pipo.append(taken[0])
        samples.resident.append(taken[1])
        samples.peer += [taken[2]] if taken[2] else []
        if round_idx < lab.settings.rounds:
            drive.sample("between")


def _ask_peer(peer: Running | None, work: Decode, samples: _Samples) -> Passes | None:
    if peer is None or samples.peer_failure:
        return None
    try:
        return peer.child.ask(work)
    except ChildFailed as failure:
        samples.peer_failure = str(failure)
        return None


def _seconds(passes: list[Passes]) -> list[float]:
    return [second for each in passes for second in each.seconds]


def _own_rows(facts: PlanFacts, bytes_per_s: float, samples: _Samples, compute_note: str) -> Iterator[Row]:
    seconds = _seconds(samples.pipo)
    compute = row("pass", "pipo resident", "s", _seconds(samples.resident), note=compute_note)
    assert compute.summary is not None
    drive_s, compute_s = facts.streamed_bytes / bytes_per_s, compute.summary.median
    floor_s = max(drive_s, compute_s)
    num_passes = sum(each.num_passes for each in samples.pipo)
    stalls: Counter[str] = Counter()
    for each in samples.pipo:
        stalls.update(dict(each.stall_s))
    stall_text = " · ".join(f"{cause} {total / num_passes:.3g} s" for cause, total in stalls.items())
    busy_s = sum(each.compute_s for each in samples.pipo) / num_passes
    yield compute
    yield row("pass", "pipo streaming", "s", seconds, note=f"computing {busy_s:.3g} s, waiting: {stall_text}")
    yield row("floor", "drive or compute", "s", [floor_s], note=f"drive {drive_s:.3g} s, compute {compute_s:.3g} s")
    yield row("pass ÷ floor", "pipo streaming", "×", [s / floor_s for s in seconds], at_most(MOST_OVER_FLOOR))
    rate = [facts.streamed_bytes / s / bytes_per_s * 100 for s in seconds]
    yield row("of the drive", "pipo streaming", "%", rate)


def _peer_rows(facts: PlanFacts, ram_bytes: int, bytes_per_s: float, samples: _Samples) -> Iterator[Row]:
    if not samples.peer:
        yield skipped("pass", PEER, samples.peer_failure)
        return
    peer = row("pass", PEER, "s", _seconds(samples.peer), note="same limit, no repacking; " + samples.peer_failure)
    assert peer.summary is not None
    yield peer
    pairs = zip(samples.pipo, samples.peer, strict=False)
    ratios = [_mean(theirs) / _mean(ours) for ours, theirs in pairs]
    yield row("ahead of mapped", "pipo streaming", "×", ratios, at_least(LEAST_AHEAD))
    compute_s = row("", "", "s", _seconds(samples.resident)).summary
    assert compute_s is not None
    # whoever keeps every byte of the budget for weights still reads the rest in every pass
    perfect_s = max((facts.weight_bytes - ram_bytes) / bytes_per_s, compute_s.median)
    yield row("ahead of mapped", "a perfect engine", "×", [peer.summary.median / perfect_s],
              note=f"{format_size(max(facts.weight_bytes - ram_bytes, 0))} per pass, {perfect_s:.3g} s")  # fmt: skip


def _mean(passes: Passes) -> float:
    return sum(passes.seconds) / len(passes.seconds)
