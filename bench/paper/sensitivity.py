"""What each assumed figure does to the predictions, 30 % to either side."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench.paper.cells import flexgen_rows, median_error, pipo_rows
from bench.paper.figures import Figures

SPREAD = 0.3
UNUSED = "rtx5060-laptop."  # no published cell is of that machine
# published or counted for one system or machine and taken over for another, which is an assumption too
CARRIED_OVER = (
    "workload.prompt_tokens",
    "flexgen.dequantise_bytes",
    "flexgen.kv_save",
    "gpu.prefill_attention_share",
    "gpu.attention_bandwidth_share",
)


@dataclass(frozen=True, slots=True)
class Summary:
    """Median errors of the three columns, and the headline: how much faster than FlexGen, in the median and at best."""

    pipo_error: float
    flexgen_error: float
    t4_error: float
    median_ratio: float
    best_ratio: float


@dataclass(frozen=True, slots=True)
class Swing:
    """`value` and what comes of it at 0.7 and at 1.3 of it."""

    key: str
    value: float
    unit: str
    low: Summary
    high: Summary


def summarise(figures: Figures) -> Summary:
    laptop = pipo_rows(figures)
    ratios = [row.ratio for row in laptop]
    return Summary(
        median_error(row.pipo_error for row in laptop),
        median_error(row.flexgen_error for row in laptop),
        median_error(row.error for row in flexgen_rows(figures)),
        median(ratios),
        max(ratios),
    )


def swings(figures: Figures) -> list[Swing]:
    return [_swing(key, figures) for key in varied(figures)]


def varied(figures: Figures) -> list[str]:
    assumed = [key for key in figures.of_kind("assumed") if not key.startswith(UNUSED)]
    return [*assumed, *CARRIED_OVER]


def _swing(key: str, figures: Figures) -> Swing:
    low, high = (summarise(figures.scaled(key, factor)) for factor in (1 - SPREAD, 1 + SPREAD))
    return Swing(key, figures[key].value, figures[key].unit, low, high)
