"""Tokens per second of several sequences that share every sweep, beside what the planner says of them.

Each budget and batch size is planned, predicted from what this machine was measured to do in the same run, and run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from bench.child import Child, ChildFailed
from bench.lab import Lab
from bench.messages import Batch
from bench.rows import Row, at_most, row, skipped
from pipo.hardware.cache import tells_of_a_drive

SHARES = (0.75, 0.5, 0.25)  # of the file
SIZES = (1, 4, 8, 16)
PROMPT_TOKENS, NUM_PASSES = 8, 8
MOST_OFF = 15.0  # %


def measure(lab: Lab) -> Iterator[Row]:
    if not tells_of_a_drive([lab.path]):
        yield skipped("batch", "all", "the file is too small to measure a drive with")
        return
    lab.plan(lab.setup(lab.roomy_bytes))  # measures the drive with every way to read that a budget might allow
    for share in SHARES:
        yield from _budget(lab, int(lab.file_bytes * share), share)


def _budget(lab: Lab, ram_bytes: int, share: float) -> Iterator[Row]:
    alone: float | None = None
    for size in SIZES:
        what = f"{size} at a time, {share:.0%} of the file"
        setup = replace(lab.setup(ram_bytes), context_tokens=PROMPT_TOKENS + NUM_PASSES + 1)
        with Child("pipo", environment={"XDG_CACHE_HOME": str(lab.settings.cache_folder)}) as child:
            try:
                found = child.ask(Batch(setup, size, PROMPT_TOKENS, NUM_PASSES))
            except ChildFailed as failure:
                yield skipped(what, "pipo", str(failure).strip().replace("\n", " "))
                continue
        rates = [size / seconds for seconds in found.passes.seconds]
        alone = alone or median(rates)
        note = f"{median(rates) / alone:.2f} × one; predicted {size / found.predicted_s:.2f} tok/s"
        yield row(what, "pipo", "tok/s", rates, note=note)
        off = abs(median(found.passes.seconds) / found.predicted_s - 1) * 100
        yield row(what, "off its prediction", "%", [off], at_most(MOST_OFF))
