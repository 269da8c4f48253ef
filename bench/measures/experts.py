"""A mixture of experts at several budgets, beside llama.cpp in the same limit: sustained, over text whose topic drifts.

Everybody decodes the same tokens, round by round where the last one ended; a peer that does not fit, the first of each
round. What pipo's cache missed is held against the fewest misses that are possible with as many slots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

from bench.child import Child, ChildFailed
from bench.lab import Lab, Unmeasurable
from bench.messages import Decode, Passes, ReplayExperts, Start
from bench.model_files import drop_cached
from bench.rows import Row, at_least, at_most, row, skipped
from pipo.base.units import MIB, format_size
from pipo.hardware.cache import tells_of_a_drive

SHARES = (1.25, 0.5, 0.25)  # of the file
FIRST_TOKEN, WARM_PASSES, PASSES_EACH = 300, 64, 32  # above the special tokens and bytes of the random model
PEER_SHARE = 5  # a peer that thrashes decodes this fraction of the tokens, from where each round begins
LEAST_AHEAD, LEAST_OF_RESIDENT_PEER = 1.5, 0.95
MOST_OF_BELADY = 1.15
_LIMIT_S = 600.0


def measure(lab: Lab) -> Iterator[Row]:
    for share in SHARES:
        try:
            yield from _budget(lab, share, _ram_bytes(lab, share))
        except (ChildFailed, Unmeasurable) as failure:
            yield skipped(f"{share:.0%}", "all", str(failure).strip().replace("\n", " "))


def _ram_bytes(lab: Lab, share: float) -> int:
    """A toy is smaller than the process around it: its tight budget is the smallest that works."""
    if tells_of_a_drive([lab.path]):
        return int(lab.file_bytes * share)
    return lab.roomy_bytes if share > 1 else lab.plan(lab.setup(MIB)).smallest_bytes


def _budget(lab: Lab, share: float, ram_bytes: int) -> Iterator[Row]:
    what = f"decode, {share:.0%} of the file"
    setup = lab.answering(ram_bytes)
    with ExitStack() as stack:
        ours, group = lab.open_limited(setup)
        peers = {} if share <= 1 and group is None else _peers(lab, ram_bytes, share)
        everybody = {"pipo": ours, **peers}
        for child in everybody.values():
            stack.callback(child.close)
        drop_cached(lab.path)
        ours.ask(Start(setup), _LIMIT_S)
        for child in peers.values():
            mode = "default" if share > 1 else "mapped"
            child.ask(Start(lab.llama_setup(mode)), _LIMIT_S)
        found: dict[str, list[Passes]] = {name: [] for name in everybody}
        begin = FIRST_TOKEN
        for round_idx in range(lab.settings.rounds + 1):
            num = WARM_PASSES if not round_idx else PASSES_EACH
            for name, child in sorted(everybody.items(), reverse=bool(round_idx % 2)):
                few = num if name == "pipo" or share > 1 else num // PEER_SHARE
                passes = child.ask(Decode(few, begin), _LIMIT_S)
                found[name] += [passes] if round_idx else []
            begin += num
        seconds = {name: [sum(p.seconds) / len(p.seconds) for p in each] for name, each in found.items()}
        yield row(what, "pipo", "s", seconds["pipo"], note=_note(found["pipo"], ram_bytes))
        for name in peers:
            yield row(what, name, "s", seconds[name])
            leads = [theirs / own for theirs, own in zip(seconds[name], seconds["pipo"], strict=True)]
            target = at_least(LEAST_OF_RESIDENT_PEER if share > 1 else LEAST_AHEAD)
            yield row(f"ahead of {name}, {share:.0%}", "pipo", "×", leads, target)
        peak = max(passes.peak_anonymous_bytes for passes in found["pipo"])
        yield row(f"peak anonymous ÷ budget, {share:.0%}", "pipo", "×", [peak / ram_bytes], at_most(1))
        if share < 1:
            yield from _cache_rows(ours, share)


def _peers(lab: Lab, ram_bytes: int, share: float) -> dict[str, Child]:
    kind = "llama-cpp-python" if lab.settings.native_site is not None else "xllamacpp"
    child = lab.open_free(kind) if share > 1 else lab.open_peer(kind, ram_bytes, sys.executable)[0]
    title = "native" if kind == "llama-cpp-python" else "wheel"
    return {f"llama.cpp {title}": child}


def _note(found: list[Passes], ram_bytes: int) -> str:
    last = dict(found[-1].experts)
    counts = {name: median(dict(each.experts)[name] for each in found) for name in last}
    num = len(found[-1].seconds)
    read = median(each.bytes_read / num for each in found)
    stalls = {cause: sum(dict(each.stall_s)[cause] for each in found) for cause, _ in found[-1].stall_s}
    total = sum(sum(each.seconds) for each in found)
    lost = " · ".join(f"{cause} {seconds / total:.0%}" for cause, seconds in stalls.items() if seconds > total / 200)
    guess = f"guesses right {counts['right'] / counts['foretold']:.0%}, " if counts["foretold"] else ""
    return (
        f"--ram {format_size(ram_bytes)}; a pass needs {counts['needed']:.0f} experts: {counts['there']:.0f} there, "
        f"{counts['guessed']:.0f} guessed, {counts['missed']:.1f} missed; {guess}{format_size(int(read))} read; {lost}"
    )


def _cache_rows(ours: Child, share: float) -> Iterator[Row]:
    replay = ours.ask(ReplayExperts(), _LIMIT_S)
    misses = dict(replay.misses)
    least = misses["Belady"]
    note = f"{replay.num_slots} slots for {replay.num_experts} experts, {replay.num_needed} needed"
    yield row(f"misses, {share:.0%}", "Belady", "%", [100 * least / replay.num_needed], note=note)
    for name, count in misses.items():
        target = at_most(MOST_OF_BELADY) if name == "pipo" else None
        yield row(f"misses ÷ Belady's, {share:.0%}", name, "×", [count / least], target)
