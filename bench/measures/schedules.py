"""What does the order of reads and computation give? One executor, one budget, three lists of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from bench.lab import Lab
from bench.messages import Decode
from bench.rows import Row, row
from pipo.base.config import SCHEDULE_NAMES


def measure(lab: Lab) -> Iterator[Row]:
    setup = lab.setup(lab.tight_bytes())
    engines = {name: lab.start_pipo(replace(setup, schedule=name)) for name in SCHEDULE_NAMES}
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for round_idx in range(lab.settings.rounds + 1):
        for name, engine in engines.items():
            passes = engine.child.ask(Decode(lab.settings.passes))
            if round_idx:  # the first one loads what stays
                seconds[name].append(list(passes.seconds))
    for name, rounds in seconds.items():
        yield row("pass", name, "s", [s for each in rounds for s in each])
    pipelined = [median(each) for each in seconds["pipelined"]]
    for name in SCHEDULE_NAMES[1:]:
        ratios = [median(each) / best for each, best in zip(seconds[name], pipelined, strict=True)]
        yield row("slower than pipelined", name, "×", ratios)
