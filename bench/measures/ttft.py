"""How long until the first token? From a cold engine, which reads every weight once, and from a warm one."""

from __future__ import annotations

from collections.abc import Iterator

from bench.host_memory import take_memory
from bench.lab import Lab
from bench.messages import FirstToken, PlanFacts, Prefill
from bench.model_files import drop_cached
from bench.rows import Row, at_most, row
from pipo.base.units import GIB

MOST_OVER_FLOOR = 1.15


def measure(lab: Lab) -> Iterator[Row]:
    setup = lab.setup(lab.tight_bytes())
    facts = lab.plan(setup)
    drive = lab.open_drive(facts)
    drop_cached(lab.path)
    drive.sweep("before")
    warm_engine = lab.start_pipo(setup)
    resident = lab.start_pipo(lab.resident_like(facts))
    prompts = (lab.settings.short_prompt_tokens, lab.settings.prompt_tokens)
    for engine in (warm_engine, resident):
        engine.child.ask(Prefill(lab.settings.short_prompt_tokens, seed=0))
    seed = 1
    starts: list[float] = []
    touches: list[float] = []
    samples: dict[tuple[str, int], list[FirstToken]] = {}
    for round_idx in range(lab.settings.rounds):
        for num_tokens in prompts:
            touches.append(take_memory(setup.ram_bytes) / (setup.ram_bytes / GIB))
            cold_engine = lab.start_pipo(setup)
            starts.append(cold_engine.start_s)
            for name, engine in (("cold", cold_engine), ("warm", warm_engine), ("resident", resident)):
                answer = engine.child.ask(Prefill(num_tokens, seed))
                samples.setdefault((name, num_tokens), []).append(answer)
            cold_engine.child.close()
            seed += 1
        if round_idx + 1 < lab.settings.rounds:
            drive.sample("between")
    drive.sweep("after")
    yield from drive.rows()
    yield row("first touch of memory", "machine", "s/GiB", touches, note="paid before each cold start, not in it")
    yield row("open to ready", "pipo cold", "s", starts, note="header, tokenizer, plan, memory; reads no weights ahead")
    for num_tokens in prompts:
        yield from _rows(num_tokens, samples, facts, drive.bytes_per_s)


def _rows(
    num_tokens: int, samples: dict[tuple[str, int], list[FirstToken]], facts: PlanFacts, bytes_per_s: float
) -> Iterator[Row]:
    what = f"first token of {num_tokens}"
    compute = row(what, "pipo resident", "s", [s.seconds for s in samples["resident", num_tokens]], note="compute")
    assert compute.summary is not None
    yield compute
    for name in ("cold", "warm"):
        answers = samples[name, num_tokens]
        num_bytes = _needed_bytes(name, answers[0].num_passes, facts)
        floor_s = max(num_bytes / bytes_per_s, compute.summary.median)
        seconds = [answer.seconds for answer in answers]
        note = f"{answers[0].num_passes} passes, {num_bytes / 1e9:.2f} GB, floor {floor_s:.3g} s"
        yield row(what, f"pipo {name}", "s", seconds, note=note)
        yield row(f"{what} ÷ floor", f"pipo {name}", "×", [s / floor_s for s in seconds], at_most(MOST_OVER_FLOOR))


def _needed_bytes(name: str, num_passes: int, facts: PlanFacts) -> int:
    """A cold engine reads every weight, then what streams once more per further pass; a warm one only streams."""
    if name == "cold":
        return facts.weight_bytes + (num_passes - 1) * facts.streamed_bytes
    return num_passes * facts.streamed_bytes
