"""Everything that the page and the terminal show, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.paper import theory
from bench.paper.cells import Breakdown, FlexgenRow, PipoRow, breakdown, flexgen_rows, pipo_rows
from bench.paper.figures import Figures
from bench.paper.published import PIPO_CELLS
from bench.paper.sensitivity import Summary, Swing, summarise, swings
from bench.paper.timeline import pictures


@dataclass(frozen=True, slots=True)
class Comparison:
    figures: Figures
    pipo: Sequence[PipoRow]
    breakdowns: Sequence[Breakdown]
    flexgen: Sequence[FlexgenRow]
    points: Sequence[theory.Point]
    base: Summary
    swings: Sequence[Swing]
    pictures: dict[str, str]


def compare(figures: Figures) -> Comparison:
    """Cost: about 15 s."""
    return Comparison(
        figures,
        pipo_rows(figures),
        [breakdown(cell, figures) for cell in PIPO_CELLS],
        flexgen_rows(figures),
        theory.sweep(),
        summarise(figures),
        swings(figures),
        pictures(figures),
    )
