"""Contests as a Markdown table and as a chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.lanes_svg import Bar, Picture, render
from bench.paper.table import Table
from bench.peers.contest import BATCH
from bench.rows import Row

_COLUMNS = {
    "decode": "s a token",
    "of the limit": "% of the limit",
    "read a token": "GB read a token",
    "of the drive": "% of the raw rate",
    "prompt": "prompt, tok/s",
    f"batch of {BATCH}": f"batch of {BATCH}, tok/s",
    "peak anonymous": "peak, MiB",
    "same tokens": "same tokens",
}
_OWN, _PEER = "#2f7d5b", "#7a869a"
_NOT_SHOWN = "pipo resident"  # the yardstick of computing, no contestant


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rows of one model at one budget."""

    model: str
    share: float
    rows: Sequence[Row]

    @property
    def budget(self) -> str:
        return f"{self.share * 100:g} %"

    def subjects(self) -> list[str]:
        """Those who were there, in their order."""
        return list(dict.fromkeys(row.subject for row in self.rows if row.metric == "decode"))

    def of(self, subject: str) -> Mapping[str, Row]:
        return {row.metric: row for row in self.rows if row.subject == subject}


def markdown(outcomes: Sequence[Outcome], machine: str) -> str:
    parts = ["# pipo and its peers", "", *machine.splitlines(), ""]
    for model in dict.fromkeys(outcome.model for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.model == model]
        columns = ("budget", "engine", *_COLUMNS.values(), "pipo is faster by")
        lines = [line for outcome in mine for line in _lines(outcome)]
        parts += [f"## {model}", "", Table(model, columns, lines).markdown(), *_notes(mine), ""]
    return "\n".join(parts)


def chart(outcomes: Sequence[Outcome], model: str) -> str:
    """Seconds a token, a lane for each engine at each budget."""
    lanes = [lane for outcome in outcomes if outcome.model == model for lane in _lanes(outcome)]
    longest_s = max((bar.end for _, bars in lanes for bar in bars), default=1.0)
    return render(Picture(f"{model}: time for one token", "shorter is better", lanes, 0.0, longest_s))


def _lines(outcome: Outcome) -> Iterator[list[str]]:
    for subject in outcome.subjects():
        rows = outcome.of(subject)
        lead = outcome.of("pipo").get(f"ahead of {subject}")
        cells = [_cell(rows.get(metric)) for metric in _COLUMNS]
        yield [outcome.budget, subject, *cells, f"{_cell(lead)} ×" if lead else ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return (
        "–"
        if row.summary is None
        else f"{row.summary.median:.3g}"
        if row.summary.median < 100
        else f"{row.summary.median:.0f}"
    )


def _notes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A footnote for each thing that was said about somebody, with the budgets at which it holds."""
    budgets: dict[str, list[str]] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            if row.note and (
                row.metric in ("decode", "plan", "of the limit")
                or row.summary is None
                or row.subject == "a perfect engine"
            ):
                value = "" if row.summary is None or row.metric == "decode" else f" {_cell(row)} {row.unit}"
                budgets.setdefault(f"{row.subject}, {row.metric}:{value} {row.note}", []).append(outcome.budget)
    for note, where in budgets.items():
        yield f"- {', '.join(where)}: {note}"


def _lanes(outcome: Outcome) -> Iterator[tuple[str, Sequence[Bar]]]:
    for subject in outcome.subjects():
        row = outcome.of(subject)["decode"]
        if subject == _NOT_SHOWN or row.summary is None:
            continue
        colour = _OWN if subject == "pipo" else _PEER
        seconds = row.summary.median
        yield f"{outcome.budget} {subject.removeprefix('llama.cpp ')}", [Bar(0.0, seconds, f"{seconds:.3g} s", colour)]
