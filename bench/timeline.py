"""Draw what the drive and the CPU did under `layer` and under `pipelined`, over the same seconds of a real run.

    python -m bench.timeline model.gguf --ram 400MB --tokens 32 --results docs/reference

More tokens in a pass are more compute for the same bytes: the pictures tell most where the two are alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.lanes_svg import Bar, Picture, render
from bench.prompts import random_prompt
from pipo.base.config import EngineConfig
from pipo.base.trace import Zone
from pipo.engine import Engine
from pipo.generation.request import SamplingParams
from pipo.model_file import ModelFile
from pipo.planner.predict import Workload

SCHEDULES = ("layer", "pipelined")
NUM_PASSES = 4  # of which the last is shown: by then everything that stays has arrived
FIRST_BLOCK, NUM_BLOCKS = 4, 6
LONGEST_GAP_S = 0.005  # between chunks of one read: a longer one lies between two passes
COLOURS = {"attention": "#2f6db5", "mlp": "#c8632b"}


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    zones = {name: _traced(args.model, args.ram, args.tokens, name) for name in SCHEDULES}
    begin, end = _window(zones["pipelined"])
    args.results.mkdir(parents=True, exist_ok=True)
    for name, each in zones.items():
        picture = _picture(args, name, each, end - begin)
        (args.results / f"timeline-measured-{name}.svg").write_text(render(picture), encoding="utf-8")


def _traced(path: Path, ram: str, num_tokens: int, schedule: str) -> list[Zone]:
    """Of the last pass over a prompt, from its first stage on."""
    config = EngineConfig(
        ram=ram, context_tokens=NUM_PASSES * num_tokens + 2, schedule=schedule, prefill_chunk=num_tokens, trace=True
    )
    with Engine(ModelFile(path), config) as engine:
        engine.start(engine.make_plan(workload=Workload(NUM_PASSES * num_tokens, 2)))
        prompt = random_prompt(NUM_PASSES * num_tokens, 0, engine.model.manifest.hyper.vocab_size)
        for _ in engine.stream(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)):
            pass
        zones = list(engine.tracer.zones)
    starts = [zone.start_s for zone in zones if zone.row == "compute" and zone.name == "attention 0"]
    return [zone for zone in zones if zone.end_s >= starts[-1]]


def _window(zones: Sequence[Zone]) -> tuple[float, float]:
    """From where FIRST_BLOCK computes to where NUM_BLOCKS have been computed, or the last one there is."""
    starts = {zone.name: zone.start_s for zone in zones if zone.row == "compute"}
    blocks = [int(name.split()[1]) for name in starts if name.startswith("attention ")]
    first = min(FIRST_BLOCK, max(blocks) // 2)
    end = starts.get(f"attention {first + NUM_BLOCKS}", max(zone.end_s for zone in zones))
    return starts[f"attention {first}"], end


def _picture(args: argparse.Namespace, schedule: str, zones: Sequence[Zone], seconds: float) -> Picture:
    begin, _ = _window(zones)
    end = begin + seconds
    lanes = [("drive → RAM", list(_reads(zones))), ("CPU", list(_computed(zones)))]
    busy = [sum(max(min(bar.end, end) - max(bar.begin, begin), 0) for bar in bars) / seconds for _, bars in lanes]
    subtitle = (
        f"Measured with --ram {args.ram}, {args.tokens} tokens a pass: attention (A) and MLP (M) of each block. "
        f"Drive busy for {busy[0]:.0%} of the time shown, CPU for {busy[1]:.0%}."
    )
    return Picture(f"--schedule {schedule} · {args.model.stem}", subtitle, lanes, begin, end)


def _reads(zones: Sequence[Zone]) -> Iterator[Bar]:
    """A unit from its first chunk to its last; where two are on their way at once, the earlier one is shown."""
    chunks = [zone for zone in zones if zone.row.startswith("read") and zone.name.split()[0] in COLOURS]
    spans: list[tuple[float, float, str]] = []
    newest: dict[str, int] = {}  # of each unit: its span
    for zone in sorted(chunks, key=lambda zone: zone.start_s):
        idx = newest.get(zone.name)
        if idx is not None and zone.start_s < spans[idx][1] + LONGEST_GAP_S:
            spans[idx] = (spans[idx][0], max(spans[idx][1], zone.end_s), zone.name)
        else:
            newest[zone.name] = len(spans)
            spans.append((zone.start_s, zone.end_s, zone.name))
    last = 0.0
    for start_s, end_s, name in spans:
        if end_s > last:
            yield _bar(name, max(start_s, last), end_s)
            last = end_s


def _computed(zones: Sequence[Zone]) -> Iterator[Bar]:
    for zone in zones:
        if zone.row == "compute" and zone.name.split()[0] in COLOURS:
            yield _bar(zone.name, zone.start_s, zone.end_s)


def _bar(name: str, start_s: float, end_s: float) -> Bar:
    kind, block = name.split()
    return Bar(start_s, end_s, f"{kind[0].upper()}{block}", COLOURS[kind])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.timeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--ram", default="2GB", help="the budget")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of a pass")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
