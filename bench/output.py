"""Results as tables on the terminal and as JSON lines on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.machine import Machine
from bench.rows import Row

_FILE_WIDTH = 180
_VERDICT = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}


def make_console() -> Console:
    """As wide as the terminal; a file gets lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title, title_justify="left", expand=False)
    for name in ("what", "of"):
        table.add_column(name, no_wrap=True)
    for name in ("median", "min", "max", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("target", "met"):
        table.add_column(name, no_wrap=True)
    table.add_column("note")
    for row in rows:
        table.add_row(row.metric, row.subject, *_numbers(row), str(row.target or ""), _VERDICT[row.is_met], row.note)
    console.print(table)


def _numbers(row: Row) -> tuple[str, str, str, str]:
    summary = row.summary
    if summary is None:
        return "–", "", "", ""
    text = f"{_digits(summary.median)} {row.unit}"
    return text, _digits(summary.min), _digits(summary.max), str(summary.count)


def _digits(value: float) -> str:
    """Three significant digits where they matter."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class ResultFile:
    """Appends rows as JSON lines, each complete in itself: date, commit and machine are repeated."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        stamp = machine.date.replace(":", "").replace("-", "").partition("+")[0]
        self.path = folder / f"{stamp}-{machine.commit.rstrip('+')}.jsonl"
        self._machine = machine

    def append(self, bench: str, model: str, rows: Sequence[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(self._entry(bench, model, row), ensure_ascii=False) + "\n")

    def _entry(self, bench: str, model: str, row: Row) -> dict[str, object]:
        return {
            "bench": bench,
            "model": model,
            "metric": row.metric,
            "subject": row.subject,
            "unit": row.unit,
            **(asdict(row.summary) if row.summary else {}),
            "target": str(row.target) if row.target else None,
            "met": row.is_met,
            "note": row.note,
            **asdict(self._machine),
        }
