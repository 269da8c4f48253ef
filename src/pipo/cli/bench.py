"""`pipo bench`: what a cache of experts would have missed in a recorded run, by its size and by who has to go."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.cli.flags import JsonFlag, OutputFlags

if TYPE_CHECKING:
    from pipo.pipeline.expert_trace import ExpertTrace

PERCENTS = (10.0, 17.0, 25.0, 38.0, 50.0, 75.0)


def bench(
    experts: Annotated[
        Path,
        typer.Option("--experts", metavar="TRACE", help="Which experts a run passed: from `pipo run --expert-trace`."),
    ],
    percent: Annotated[
        list[float] | None,
        typer.Option("--percent", metavar="P", min=0, max=100, help="Of the experts in RAM; may be repeated."),
    ] = None,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
) -> None:
    """Hold policies of eviction against the fewest misses possible, Belady's, on a recorded run.

    Of what a run needed, the share that each policy would have missed with so many experts in RAM.
    """
    from pipo.cli.terminal import stderr, write_json
    from pipo.pipeline.expert_trace import policies, read_trace

    trace = read_trace(experts)
    found: dict[float, dict[str, int]] = {}
    is_shown = stderr().is_terminal and not output.quiet
    for each in sorted(percent or PERCENTS):
        with stderr().status(f"replaying with {each:g} % of the experts …") if is_shown else nullcontext():
            found[each] = dict(policies(trace, slots_of(trace, each)))
    if json:
        write_json(_as_dict(experts, trace, found))
        return
    _print(trace, found)


def slots_of(trace: ExpertTrace, percent: float) -> int:
    """Those of one token in a block at least."""
    head = trace.head
    return max(int(head.num_blocks * head.num_experts * percent / 100), head.num_experts_per_tok)


def _print(trace: ExpertTrace, found: dict[float, dict[str, int]]) -> None:
    from pipo.cli.terminal import print_columns, print_rows, stdout

    head, needed = trace.head, max(trace.num_needed, 1)
    what = f"{head.num_experts_per_tok} of {head.num_experts} experts in each of {head.num_blocks} blocks"
    num_passes = sum(1 for _ in trace.passes())
    print_rows(stdout(), head.model or "a run", [("routing", what), ("run", f"{num_passes} passes, {needed} needed")])
    stdout().print()
    names = list(next(iter(found.values())))
    columns = ("in RAM", *names)
    lines = [
        (f"{percent:g} %", *(_cell(misses[name], misses[names[0]], needed) for name in names))
        for percent, misses in found.items()
    ]
    print_columns(stdout(), columns, lines, indent="  ")
    stdout().print()
    stdout().print("  misses as a share of what was needed, and as a multiple of the fewest possible")


def _cell(misses: int, least: int, needed: int) -> str:
    times = f" ({misses / least:.2f})" if least and misses != least else ""
    return f"{misses / needed:.1%}{times}"


def _as_dict(file: Path, trace: ExpertTrace, found: dict[float, dict[str, int]]) -> dict[str, object]:
    return {
        "trace": str(file),
        "model": trace.head.model,
        "num_blocks": trace.head.num_blocks,
        "num_experts": trace.head.num_experts,
        "num_experts_per_tok": trace.head.num_experts_per_tok,
        "num_needed": trace.num_needed,
        "sizes": [
            {"percent": percent, "num_slots": slots_of(trace, percent), "misses": misses}
            for percent, misses in found.items()
        ],
    }
