"""A table of text, for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", expand=False)
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def rate(tokens_per_s: float | None) -> str:
    """With the digits that the published tables have."""
    if tokens_per_s is None:
        return "–"
    return f"{tokens_per_s:.2f}" if tokens_per_s >= 0.1 else f"{tokens_per_s:.3f}"


def signed_percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.0%}".replace("-", "−")


def percent(share: float) -> str:
    return f"{share:.0%}"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"
