"""The figures of assumptions.toml, each with its unit and source."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

PATH = Path(__file__).parent / "assumptions.toml"
KINDS = ("published", "data sheet", "counted", "assumed")


@dataclass(frozen=True, slots=True)
class Figure:
    value: float
    unit: str
    kind: str
    source: str


class Figures(Mapping[str, Figure]):
    """By "group.name". `of` gives the bare value."""

    def __init__(self, figures: Mapping[str, Figure]) -> None:
        self._figures = dict(figures)

    @classmethod
    def load(cls, path: Path = PATH) -> Figures:
        groups = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(
            {f"{group}.{name}": Figure(**each) for group, names in groups.items() for name, each in names.items()}
        )

    def __getitem__(self, key: str) -> Figure:
        return self._figures[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def of(self, key: str) -> float:
        return self._figures[key].value

    def scaled(self, key: str, factor: float) -> Figures:
        """The same with one figure multiplied."""
        figure = self._figures[key]
        return Figures(self._figures | {key: replace(figure, value=figure.value * factor)})

    def of_kind(self, kind: str) -> list[str]:
        return [key for key, figure in self._figures.items() if figure.kind == kind]
