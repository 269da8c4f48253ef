"""Measure pipo on this machine.

    python -m bench                                  every measure, on random models of real shape
    python -m bench streaming ttft --model big.gguf
    python -m bench resident --shape tinyllama-1.1b --type q4_0 q4_k
    python -m bench --quick                          all of it in a minute, on a toy: does the bench itself work?
    python -m bench load --clients 64 smollm2        many clients at once against `pipo serve`; see bench/load.py

Prints tables and appends JSON lines to bench/results/. Numbers are worth something on an idle machine only.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bench import load
from bench.arguments import asked_for
from bench.child import Child, ChildFailed
from bench.lab import FULL, QUICK, Lab, Settings, Unmeasurable
from bench.machine import describe_machine
from bench.measures import balance, batch, experts, memory, raw, resident, schedules, streaming, ttft
from bench.messages import Library
from bench.model_files import ModelSource, model_file
from bench.output import ResultFile, make_console, print_table
from bench.random_mixture import SHAPES as MIXTURES
from bench.random_model import MIXES, SHAPES
from bench.rows import Row, skipped
from pipo.store.library import KNOWN_MODELS, models_folder

Measure = Callable[[Lab], Iterator[Row]]
MEASURES: dict[str, Measure] = {
    "raw": raw.measure,
    "streaming": streaming.measure,
    "ttft": ttft.measure,
    "resident": resident.measure,
    "memory": memory.measure,
    "schedules": schedules.measure,
    "balance": balance.measure,
    "batch": batch.measure,
    "experts": experts.measure,
}
RESULTS = Path(__file__).parent / "results"
# what each measure runs on when nothing is named; `None` is the small real model, where it was pulled
ALL_TYPES = ("q4_0", "q4_k", "q4_1", "q6_k", "q8_0", "f16", "bf16")
SEVEN_B = ModelSource(shape="llama-7b", type="q4_0")
DEFAULTS: dict[str, tuple[ModelSource, ...]] = {
    "resident": (
        *(ModelSource(shape="tinyllama-1.1b", type=type) for type in ALL_TYPES),
        SEVEN_B,
        ModelSource(shape="llama-7b", type="q4_k"),
    ),
    "balance": (ModelSource(shape="tinyllama-1.1b", type="q4_0"),),
    "experts": (ModelSource(shape="moe-6b", type="q4_0"),),
    "memory": (ModelSource(path=KNOWN_MODELS["smollm2"].path), SEVEN_B),
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["load"]:
        sys.exit(load.main(given[1:]))
    args = _parse(given)
    console = make_console()
    with TemporaryDirectory(prefix="pipo-bench-") as cache:
        machine = describe_machine(args.scratch, _library())
        results = ResultFile(args.results, machine)
        console.print(machine.text, highlight=False)
        settings = _settings(args, Path(cache))
        for source, names in _by_model(args):
            with model_file(source, args.scratch, args.keep) as path:
                for name in names:
                    _run(name, source, path, settings, console, results)
        console.print(f"rows: {results.path}", highlight=False)


def _library() -> str:
    with Child("pipo", environment={}) as child:
        return child.ask(Library())


def _run(name: str, source: ModelSource, path: Path, settings: Settings, console: Console, results: ResultFile) -> None:
    """What was measured is kept and shown, however the measure ends."""
    rows: list[Row] = []
    title = f"{name} · {source.name}"
    try:
        with console.status(title), Lab(settings, path) as lab:
            rows.extend(MEASURES[name](lab))
    except (ChildFailed, Unmeasurable) as failure:
        rows.append(skipped(name, "all", str(failure)))
    finally:
        results.append(name, source.name, rows)
        print_table(console, title, rows)


def _by_model(args: argparse.Namespace) -> list[tuple[ModelSource, list[str]]]:
    """Each model once, with the measures that want it."""
    wanted: dict[ModelSource, list[str]] = {}
    for name in args.measures or MEASURES:
        for source in _named_sources(args, name) or DEFAULTS.get(name, (SEVEN_B,)):
            if source.path is None or source.path.is_file():
                wanted.setdefault(source, []).append(name)
    return list(wanted.items())


def _named_sources(args: argparse.Namespace, measure: str) -> tuple[ModelSource, ...]:
    if args.model is not None:
        return (ModelSource(path=args.model.resolve()),)
    if args.shape is None and args.type is None and not args.quick:
        return ()
    toy = "smoke-moe" if measure == "experts" else "smoke"
    shape = args.shape or (toy if args.quick else "llama-7b")
    return tuple(ModelSource(shape=shape, type=type) for type in args.type or ("q4_0",))


def _settings(args: argparse.Namespace, cache: Path) -> Settings:
    return asked_for(args, replace(QUICK if args.quick else FULL, share=args.share, cache_folder=cache))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(MEASURES)}; all without")
    add("--model", type=Path, metavar="FILE", help="a GGUF file, instead of one of random weights")
    add("--shape", choices=[*SHAPES, *MIXTURES], help="of the random model")
    add("--type", choices=MIXES, nargs="+", help="of the random model; several are measured one after another")
    add("--share", type=float, default=FULL.share, help="the tight budget, as a share of the file (0.55)")
    add("--rounds", type=int, metavar="N", help="how often each piece of work is repeated")
    add("--passes", type=int, metavar="N", help="decode passes per round")
    add("--threads", type=int, metavar="N", help="compute threads of every engine; all cores without")
    add("--quick", action="store_true", help="a toy model and few rounds")
    add("--native-llama", type=Path, metavar="SITE", help="folder that holds an uninstalled llama_cpp package")
    add("--scratch", type=Path, default=models_folder().parent / "bench", help="where random models are written")
    add("--keep", action="store_true", help="keep the random models for the next run")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.measures if name not in MEASURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is not a measure; known: {', '.join(MEASURES)}")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave through the blocks: limits and models are removed
    main()
