"""Compare pipo with its peers on this machine.

    python -m bench.peers                            7B against llama.cpp, 1.1B in BF16 against accelerate and AirLLM
    python -m bench.peers --model 7b --budgets 75 50 25 --peers mapped native --rounds 10
    python -m bench.peers --quick                    a toy in seconds: does the comparison itself work?

Makes an environment for each peer on first use. Prints tables; appends JSON lines to bench/results/ and writes a
Markdown table and charts beside them. Numbers are worth something on an idle machine only.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from bench.arguments import asked_for
from bench.child import Child, ChildFailed
from bench.lab import FULL, QUICK, Lab, Settings, Unmeasurable
from bench.machine import describe_machine
from bench.messages import Library
from bench.model_files import ModelSource, model_file
from bench.output import ResultFile, make_console, print_table
from bench.peers.contest import Ground, contest, run
from bench.peers.entrants import ENTRANTS, OF_FOLDER, OF_GGUF
from bench.peers.environments import environments_folder
from bench.peers.report import Outcome, chart, markdown
from bench.peers.verdict import rows_of
from bench.random_checkpoint import write_random_checkpoint
from bench.rows import Row, skipped
from pipo.store.library import models_folder

RESULTS = Path(__file__).parents[1] / "results"
BUDGETS = (125.0, 75.0, 50.0, 25.0)  # % of the file
QUICK_BUDGETS = (125.0, 50.0)


@dataclass(frozen=True, slots=True)
class Match:
    """A model, and those who meet on it; `in_folder` where some of them read no GGUF."""

    source: ModelSource
    peers: tuple[str, ...]
    in_folder: bool = False


MATCHES = {
    "7b": Match(ModelSource(shape="llama-7b", type="q4_0"), OF_GGUF),
    "1.1b": Match(ModelSource(shape="tinyllama-1.1b", type="bf16"), OF_FOLDER, in_folder=True),
}
QUICK_MATCHES = {"toy": Match(ModelSource(shape="smoke", type="bf16"), ("mapped", "direct", "default"))}


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bench").setLevel(logging.INFO)  # minutes pass between two tables
    console = make_console()
    with TemporaryDirectory(prefix="pipo-peers-") as cache:
        with Child("pipo", environment={}) as child:
            machine = describe_machine(args.scratch, child.ask(Library()))
        console.print(machine.text, highlight=False)
        results = ResultFile(args.results, machine)
        outcomes: list[Outcome] = []
        for match in _matches(args):
            for outcome in _compare(match, args, _settings(args, Path(cache))):
                print_table(console, f"{outcome.model} · {outcome.budget}", outcome.rows)
                results.append(f"peers {outcome.budget}", outcome.model, outcome.rows)
                outcomes.append(outcome)
                _write(outcomes, results.path, machine.text)
        console.print(f"rows: {results.path}, table and charts beside it", highlight=False)


def _compare(match: Match, args: argparse.Namespace, settings: Settings) -> Iterator[Outcome]:
    with ExitStack() as stack:
        path = stack.enter_context(model_file(match.source, args.scratch, args.keep))
        folder = _folder(match, path, args.keep, stack)
        for budget in args.budgets or (QUICK_BUDGETS if args.quick else BUDGETS):
            ground = Ground(budget / 100, folder, environments_folder(), is_toy=args.quick)
            names = [name for name in match.peers if name in (args.peers or match.peers)]
            rows: list[Row] = []
            try:
                _measure(path, ground, names, settings, rows)
            except (ChildFailed, Unmeasurable) as failure:
                rows.append(skipped("decode", "all", str(failure)))
            except SystemExit:  # told to end: what was measured is kept
                yield Outcome(match.source.name, ground.share, rows)
                raise
            yield Outcome(match.source.name, ground.share, rows)


def _folder(match: Match, path: Path, keep: bool, stack: ExitStack) -> Path | None:
    """The same weights once more, for those who read no GGUF."""
    if not match.in_folder:
        return None
    folder = path.with_suffix(".hf")
    if not keep:
        stack.callback(rmtree, folder, ignore_errors=True)
    if not folder.exists():
        aside = folder.with_suffix(".part")
        rmtree(aside, ignore_errors=True)
        write_random_checkpoint(aside, match.source.shape)
        aside.rename(folder)
    return folder


def _measure(path: Path, ground: Ground, names: Sequence[str], settings: Settings, rows: list[Row]) -> None:
    """Rows of whatever was measured until it ended, or was ended."""
    with Lab(settings, path) as lab, contest(lab, ground, [ENTRANTS[name] for name in names]) as score:
        try:
            run(lab, score)
        finally:
            rows.extend(rows_of(score, ground.share))


def _write(outcomes: Sequence[Outcome], lines: Path, machine: str) -> None:
    """Beside the JSON lines; again after every contest, so that what was measured is there when a run is ended."""
    lines.with_suffix(".peers.md").write_text(markdown(outcomes, machine), encoding="utf-8")
    for model in dict.fromkeys(outcome.model for outcome in outcomes):
        name = f"{lines.stem}.{model.replace(' ', '-')}.svg"
        lines.with_name(name).write_text(chart(outcomes, model), encoding="utf-8")


def _matches(args: argparse.Namespace) -> list[Match]:
    if args.quick:
        return list(QUICK_MATCHES.values())
    return [MATCHES[name] for name in args.model or MATCHES]


def _settings(args: argparse.Namespace, cache: Path) -> Settings:
    amounts = replace(QUICK if args.quick else replace(FULL, rounds=10), cache_folder=cache)
    return asked_for(args, replace(amounts, prompt_tokens=args.prompt or amounts.prompt_tokens))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MATCHES, nargs="+", help="which model to meet on; both without")
    add("--peers", choices=ENTRANTS, nargs="+", help="who is met; everybody without")
    add("--budgets", type=float, nargs="+", metavar="PERCENT", help="of the file (125 75 50 25)")
    add("--rounds", type=int, metavar="N", help="interleaved pairs (10)")
    add("--passes", type=int, metavar="N", help="decode passes of everybody in each round")
    add("--prompt", type=int, metavar="TOKENS", help="of the prompt that is timed (512)")
    add("--threads", type=int, metavar="N", help="compute threads of every engine; all cores without")
    add("--quick", action="store_true", help="a toy model and few rounds, without the peers that need PyTorch")
    add("--native-llama", type=Path, metavar="SITE", help="folder that holds a llama_cpp package built here")
    add("--scratch", type=Path, default=models_folder().parent / "bench", help="where random models are written")
    add("--keep", action="store_true", help="keep the random models for the next run")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args(arguments)


def _leave(*_: object) -> None:
    """Through the blocks: limits and models are removed, what was measured is written. Once, whatever comes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    main()
