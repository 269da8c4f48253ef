"""Predict the published tables of PIPO and FlexGen, and compare.

    python -m bench.paper                print the tables, draw the timelines into bench/results/paper/
    python -m bench.paper --markdown     also write docs/reference/paper.md and its pictures
    python -m bench.paper --profiles     also write the machine profiles that the package ships

Arithmetic only: it measures nothing and takes a quarter of a minute on any machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.output import make_console
from bench.paper.comparison import Comparison, compare
from bench.paper.figures import Figures
from bench.paper.machines import NAMES, machine
from bench.paper.page import page, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "paper"
PAGE = ROOT / "docs" / "reference" / "paper.md"
PROFILES = ROOT / "src" / "pipo" / "hardware" / "profiles"


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    figures = Figures.load()
    if args.profiles:
        write_profiles(figures, PROFILES)
    found = compare(figures)
    console = make_console()
    for table in tables(found):
        table.show(console)
    _write_pictures(found, args.results)
    console.print(f"timelines: {args.results}", highlight=False)
    if args.markdown:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(found), encoding="utf-8")
        _write_pictures(found, PAGE.parent)
        console.print(f"page: {PAGE}", highlight=False)


def _write_pictures(found: Comparison, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in found.pictures.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_profiles(figures: Figures, folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name}.json").write_text(machine(name, figures).to_json() + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="write docs/reference/paper.md")
    parser.add_argument("--profiles", action="store_true", help="write src/pipo/hardware/profiles/*.json")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the timelines go")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
