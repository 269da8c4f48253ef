"""The paper's ablation, measured: three orders of the same steps, from little compute per byte to much of it.

Each order has the same budget and layout, planned as any request is: slots by simulation. More tokens in a pass are
more compute for the same bytes. Each ratio stands beside what the simulator says of this very placement, from figures
that the machine was measured with in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.lab import Lab, Running
from bench.messages import FirstToken, Forecast, PassForecast, PipoSetup, Prefill
from bench.rows import Row, row, skipped
from pipo.base.config import SCHEDULE_NAMES
from pipo.base.units import MIB
from pipo.hardware.cache import tells_of_a_drive

SHARES = (0.05, 0.5, 0.8)  # of the memory between the smallest budget and all resident
TOKENS = (1, 8, 16, 32, 64, 128)  # of a pass
_PASSES = 6  # of a prompt, at least
_PROMPT_TOKENS = 24  # at least
_SLOWER = SCHEDULE_NAMES[1:]


def measure(lab: Lab) -> Iterator[Row]:
    if not tells_of_a_drive([lab.path]):
        yield skipped("balance", "all", "the file is too small to measure a drive with")
        return
    widest = replace(lab.setup(lab.roomy_bytes), prefill_chunk=max(TOKENS))
    roomy, smallest = lab.plan(widest), lab.plan(replace(widest, ram_bytes=1)).smallest_bytes + 48 * MIB
    lab.forecast(Forecast(lab.setup(lab.roomy_bytes), 1))  # measures the machine with room for it
    for share in SHARES:
        ram_bytes = smallest + int((roomy.needed_bytes - smallest) * share)
        for tokens in TOKENS:
            request = max(_PASSES * tokens, _PROMPT_TOKENS), 2
            setup = replace(lab.setup(ram_bytes), prefill_chunk=tokens, request=request)
            yield from _point(lab, setup, tokens, share)


def _point(lab: Lab, setup: PipoSetup, tokens: int, share: float) -> Iterator[Row]:
    layout = "repacked" if lab.plan(setup).repacked_types else "plain"
    setups = {name: replace(setup, schedule=name, layout=layout) for name in SCHEDULE_NAMES}
    expected = {name: lab.forecast(Forecast(each, tokens)) for name, each in setups.items()}
    with lab.started(setups) as engines:
        seconds = _run_rounds(lab, engines, tokens)
    what = f"{tokens} tokens, {share:.0%} of the rest stays"
    best = expected["pipelined"]
    yield row(what, "pipelined", "s", seconds["pipelined"], note=_balance(best))
    for name in _SLOWER:
        ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["pipelined"], strict=True)]
        yield row(
            what, f"{name} ÷ pipelined", "×", ratios, note=f"simulated {expected[name].seconds / best.seconds:.2f}"
        )


def _run_rounds(lab: Lab, engines: dict[str, Running], tokens: int) -> dict[str, list[float]]:
    """Seconds a pass, one figure for each round; the first round, which loads what stays, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    num_tokens = max(_PASSES * tokens, _PROMPT_TOKENS)
    for round_idx in range(lab.settings.rounds + 1):
        for name, engine in engines.items():
            answer: FirstToken = engine.child.ask(Prefill(num_tokens, seed=round_idx + 1))
            if round_idx:
                seconds[name].append(answer.seconds / answer.num_passes)
    return seconds


def _balance(best: PassForecast) -> str:
    ratio = best.compute_s / best.drive_s if best.drive_s else float("inf")
    return f"compute ÷ reads {ratio:.2f}; simulated {best.seconds:.3f} s"
