"""The cells of both tables beside what the simulator says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from bench.paper.figures import Figures
from bench.paper.machines import machine
from bench.paper.policy import Policy, filled, laptop_policy
from bench.paper.predict import Job, Prediction, predict
from bench.paper.published import FLEXGEN_CELLS, PIPO_CELLS, FlexgenCell, PipoCell
from bench.paper.shapes import SHAPES, Shape
from bench.paper.systems import (
    LAPTOP,
    System,
    accelerate_on_t4,
    flexgen_on_laptop,
    flexgen_on_t4,
    pipo_on_laptop,
    zero_on_t4,
)


@dataclass(frozen=True, slots=True)
class PipoRow:
    """`flexgen` runs under `layer` with FlexGen's kernels and transfers, `pipo` under `pipelined` with PIPO's."""

    cell: PipoCell
    policy: Policy
    flexgen: Prediction
    pipo: Prediction

    @property
    def ratio(self) -> float:
        return self.pipo.tokens_per_s / self.flexgen.tokens_per_s

    @property
    def flexgen_error(self) -> float | None:
        return error(self.flexgen.tokens_per_s, self.cell.flexgen)

    @property
    def pipo_error(self) -> float | None:
        return error(self.pipo.tokens_per_s, self.cell.pipo)

    @property
    def ratio_error(self) -> float | None:
        return error(self.ratio, self.cell.ratio)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The steps from FlexGen to PIPO one by one. `order`: FlexGen's kernels and transfers, `pipelined`; `transfers`:
    PIPO's too; `kernels`: PIPO's too, which makes it PIPO. `layer` and `sequential`: PIPO's kernels and transfers.
    """

    cell: PipoCell
    flexgen_sequential: Prediction
    flexgen: Prediction
    order: Prediction
    transfers: Prediction
    kernels: Prediction
    layer: Prediction
    sequential: Prediction


@dataclass(frozen=True, slots=True)
class FlexgenRow:
    cell: FlexgenCell
    predicted: Prediction

    @property
    def error(self) -> float | None:
        return error(self.predicted.tokens_per_s, self.cell.tokens_per_s)


def error(predicted: float, published: float | None) -> float | None:
    """Relative to what was published: 0.1 is ten percent too fast."""
    return predicted / published - 1 if published else None


def median_error(errors: Iterable[float | None]) -> float:
    """Of the sizes of those there are."""
    return median(abs(each) for each in errors if each is not None)


def pipo_rows(figures: Figures) -> list[PipoRow]:
    return [_pipo_row(cell, figures) for cell in PIPO_CELLS]


def _pipo_row(cell: PipoCell, figures: Figures) -> PipoRow:
    flexgen = predict(flexgen_laptop_job(cell, figures), "layer")
    ours = pipo_job(cell, figures)
    return PipoRow(cell, ours.policy, flexgen, predict(ours, "pipelined"))


def breakdown(cell: PipoCell, figures: Figures) -> Breakdown:
    theirs, ours = flexgen_laptop_job(cell, figures), pipo_job(cell, figures)
    moved = replace(ours, system=replace(ours.system, machine=theirs.system.machine))
    return Breakdown(
        cell,
        predict(theirs, "sequential"),
        predict(theirs, "layer"),
        predict(theirs, "pipelined"),
        predict(moved, "pipelined"),
        *(predict(ours, schedule) for schedule in ("pipelined", "layer", "sequential")),
    )


def pipo_job(cell: PipoCell, figures: Figures) -> Job:
    return _laptop_job(cell, pipo_on_laptop(SHAPES[cell.model], figures), figures)


def flexgen_laptop_job(cell: PipoCell, figures: Figures) -> Job:
    return _laptop_job(cell, flexgen_on_laptop(SHAPES[cell.model], figures), figures)


def _laptop_job(cell: PipoCell, system: System, figures: Figures) -> Job:
    shape = SHAPES[cell.model]
    policy = laptop_policy(shape, cell.is_on_disk, cell.batch, machine(LAPTOP, figures), figures)
    return job(shape, policy, system, figures)


def flexgen_rows(figures: Figures) -> list[FlexgenRow]:
    return [FlexgenRow(cell, predict(flexgen_job(cell, figures), cell.schedule)) for cell in FLEXGEN_CELLS]


def flexgen_job(cell: FlexgenCell, figures: Figures) -> Job:
    makers = {"accelerate": accelerate_on_t4, "ZeRO": zero_on_t4}
    return t4_job(cell, makers.get(cell.system, flexgen_on_t4)(figures), figures)


def t4_job(cell: FlexgenCell, system: System, figures: Figures) -> Job:
    shape = SHAPES[cell.model]
    return job(shape, filled(cell.policy, shape, system.machine, figures), system, figures)


def job(shape: Shape, policy: Policy, system: System, figures: Figures) -> Job:
    keys = ("workload.prompt_tokens", "workload.output_tokens", "paper.slots_per_class")
    prompt_tokens, output_tokens, slots_per_class = (int(figures.of(key)) for key in keys)
    return Job(shape, policy, system, prompt_tokens, output_tokens, slots_per_class)
