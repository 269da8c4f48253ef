"""The same blocks under `layer` and under `pipelined`, drawn over the same seconds."""

from __future__ import annotations

from bench.lanes_svg import Bar, Picture, render
from bench.paper.cells import flexgen_laptop_job
from bench.paper.figures import Figures
from bench.paper.predict import Job, costs, needs, residency
from bench.paper.published import PIPO_CELLS
from pipo.planner.residency import Step, StepKind
from pipo.planner.schedule import SCHEDULES
from pipo.planner.simulate import Lane, Line, Span

CELL = next(cell for cell in PIPO_CELLS if cell.model == "OPT-13B" and cell.batch == 8)
FIRST_BLOCK, NUM_BLOCKS = 10, 8  # of the second pass; as many blocks as `pipelined` computes in the time shown
LANES = {"drive → RAM": Lane.DRIVE, "RAM → GPU": Lane.UPLOAD, "GPU": Lane.DEVICE}
ATTENTION, MLP = "#2f6db5", "#c8632b"
FILES = {"layer": "timeline-layer.svg", "pipelined": "timeline-pipelined.svg"}


def pictures(figures: Figures) -> dict[str, str]:
    """SVG text by file name."""
    job = flexgen_laptop_job(CELL, figures)
    begin, end = _window(_spans(job, "pipelined"))
    return {file: render(_picture(job, schedule, end - begin)) for schedule, file in FILES.items()}


def _picture(job: Job, schedule: str, seconds: float) -> Picture:
    spans = _spans(job, schedule)
    begin, _ = _window(spans)
    lanes = [(name, [_bar(span, job) for span in spans if span.lane is lane]) for name, lane in LANES.items()]
    busy = sum(_overlap(span, begin, begin + seconds) for span in spans if span.lane is Lane.DEVICE) / seconds
    subtitle = (
        f"OPT-13B in 4 bits, batch {CELL.batch}, one decode pass from block {FIRST_BLOCK}: "
        f"attention (A, blue) and MLP (M, orange) of each block. GPU busy for {busy:.0%} of the time shown."
    )
    return Picture(f"--schedule {schedule}", subtitle, lanes, begin, begin + seconds)


def _overlap(span: Span, begin: float, end: float) -> float:
    return max(min(span.end, end) - max(span.begin, begin), 0.0)


def _spans(job: Job, schedule: str) -> list[Span]:
    """Of two decode passes: in the second, the slots are full from the start."""
    step_costs, _ = costs(job, is_prefill=False)
    line = Line(needs(job), SCHEDULES[schedule], residency(job))
    for _ in range(2):
        line.run_pass(step_costs)
    return line.simulator.spans


def _window(spans: list[Span]) -> tuple[float, float]:
    """From when block FIRST_BLOCK computes to when NUM_BLOCKS have been computed."""
    stage = 1 + 2 * FIRST_BLOCK
    computed = [span for span in spans if span.step.kind is StepKind.COMPUTE]
    second_pass = computed[len(computed) // 2 :]
    begin = next(span.begin for span in second_pass if span.step.stage_idx == stage)
    end = next(span.begin for span in second_pass if span.step.stage_idx == stage + 2 * NUM_BLOCKS)
    return begin, end


def _bar(span: Span, job: Job) -> Bar:
    stage = _stage_of(span.step)
    is_attention = stage % 2 == 1
    is_block = 0 < stage <= 2 * job.shape.num_layers
    name = f"{'A' if is_attention else 'M'}{(stage - 1) // 2}" if is_block else "embedding"
    return Bar(span.begin, span.end, name, ATTENTION if is_attention else MLP)


def _stage_of(step: Step) -> int:
    """Units are numbered as their stages are."""
    return step.stage_idx if step.kind is StepKind.COMPUTE else step.unit_id
