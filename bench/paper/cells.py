"""The cells of both tables beside what the simulator says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    """`flexgen` runs under `layer` with FlexGen's kernels and transfers, `pipo` under `pipelined` with PIPO's.

    `layer` and `sequential` are PIPO's kernels and transfers under those: what the order of steps alone changes.
    """

    cell: PipoCell
    policy: Policy
    flexgen: Prediction
    pipo: Prediction
    layer: Prediction
    sequential: Prediction

    @property
    def ratio(self) -> float:
        return self.pipo.tokens_per_s / self.flexgen.tokens_per_s

    @property
    def ratio_of_order(self) -> float:
        return self.pipo.tokens_per_s / self.layer.tokens_per_s

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
class FlexgenRow:
    """`pipelined` is the same system and policy in the other order of steps; nobody published it."""

    cell: FlexgenCell
    predicted: Prediction
    pipelined: Prediction

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
    shape = SHAPES[cell.model]
    policy = laptop_policy(shape, cell.is_on_disk, cell.batch, machine(LAPTOP, figures), figures)
    ours = job(shape, policy, pipo_on_laptop(shape, figures), figures)
    theirs = job(shape, policy, flexgen_on_laptop(shape, figures), figures)
    return PipoRow(
        cell, policy, predict(theirs, "layer"), *(predict(ours, name) for name in ("pipelined", "layer", "sequential"))
    )


def flexgen_rows(figures: Figures) -> list[FlexgenRow]:
    return list(_flexgen_rows(figures))


def _flexgen_rows(figures: Figures) -> Iterator[FlexgenRow]:
    for cell in FLEXGEN_CELLS:
        task = flexgen_job(cell, _system(cell, figures), figures)
        yield FlexgenRow(cell, predict(task, cell.schedule), predict(task, "pipelined"))


def flexgen_job(cell: FlexgenCell, system: System, figures: Figures) -> Job:
    shape = SHAPES[cell.model]
    return job(shape, filled(cell.policy, shape, system.machine, figures), system, figures)


def _system(cell: FlexgenCell, figures: Figures) -> System:
    makers = {"accelerate": accelerate_on_t4, "ZeRO": zero_on_t4}
    return makers.get(cell.system, flexgen_on_t4)(figures)


def job(shape: Shape, policy: Policy, system: System, figures: Figures) -> Job:
    keys = ("workload.prompt_tokens", "workload.output_tokens", "paper.slots_per_class")
    prompt_tokens, output_tokens, slots_per_class = (int(figures.of(key)) for key in keys)
    return Job(shape, policy, system, prompt_tokens, output_tokens, slots_per_class)
