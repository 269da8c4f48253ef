"""The tables of the comparison: published, predicted, error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from bench.paper import theory
from bench.paper.cells import Breakdown, FlexgenRow, PipoRow, median_error, t4_job
from bench.paper.figures import Figures
from bench.paper.predict import Prediction, predict
from bench.paper.published import BEST_RATIO, BUSY_AFTER, BUSY_BEFORE, FLEXGEN_CELLS, PipoCell
from bench.paper.sensitivity import Summary, Swing
from bench.paper.systems import flexgen_on_t4
from bench.paper.table import Table, percent, rate, signed_percent, times


def pipo_table(rows: Sequence[PipoRow]) -> Table:
    each = ("published", "predicted", "error")
    columns = ["model", "weights in", "batch", "KV in"]
    columns += [f"{name} {what}" for name in ("FlexGen", "PIPO", "ratio") for what in each]
    lines = [_pipo_line(row) for row in rows]
    errors = (median_error(getattr(row, f"{name}_error") for row in rows) for name in ("flexgen", "pipo", "ratio"))
    last = ["median size of errors", "", "", "", *(text for each in errors for text in ("", "", percent(each)))]
    return Table("PIPO's table: tokens/s, and how much faster PIPO is", columns, [*lines, last])


def _pipo_line(row: PipoRow) -> list[str]:
    cell = row.cell
    return [
        *_cell(cell),
        f"{row.policy.kv.value}{', 4 bits' if row.policy.kv_type.name == 'Q4_0' else ''}",
        *(rate(cell.flexgen), rate(row.flexgen.tokens_per_s), signed_percent(row.flexgen_error)),
        *(rate(cell.pipo), rate(row.pipo.tokens_per_s), signed_percent(row.pipo_error)),
        *(times(cell.ratio), times(row.ratio), signed_percent(row.ratio_error)),
    ]


def _cell(cell: PipoCell) -> tuple[str, str, str]:
    return cell.model, "disk" if cell.is_on_disk else "RAM", str(cell.batch)


@dataclass(frozen=True, slots=True)
class Group:
    """Cells of one regime, and the medians of their ratios."""

    name: str
    published: float
    predicted: float
    order: float


def groups(rows: Sequence[PipoRow], breakdowns: Sequence[Breakdown]) -> list[Group]:
    """By what the weights come over: the link alone, the page cache, the drive."""
    names: dict[str, Callable[[PipoCell], bool]] = {
        "link (weights in RAM)": lambda cell: not cell.is_on_disk,
        "page cache (on disk, 6.7B to 30B)": lambda cell: cell.is_on_disk and not _is_large(cell),
        "drive (66B, 70B)": _is_large,
    }
    return [_group(name, belongs, rows, breakdowns) for name, belongs in names.items()]


def _is_large(cell: PipoCell) -> bool:
    return cell.model in ("OPT-66B", "Llama3.1-70B")


def _group(
    name: str, belongs: Callable[[PipoCell], bool], rows: Sequence[PipoRow], breakdowns: Sequence[Breakdown]
) -> Group:
    mine = [row for row in rows if belongs(row.cell)]
    published = median(row.cell.ratio for row in mine if row.cell.ratio)
    order = median(_ratio(each.kernels, each.layer) for each in breakdowns if belongs(each.cell))
    return Group(name, published, median(row.ratio for row in mine), order)


def group_table(found: Iterable[Group]) -> Table:
    columns = ("weights come over", "ratio published", "ratio predicted", "of it by order alone")
    lines = [[each.name, times(each.published), times(each.predicted), times(each.order)] for each in found]
    return Table("Medians of the ratio by where the weights come from", columns, lines)


def breakdown_table(rows: Sequence[Breakdown]) -> Table:
    columns = (
        "model", "weights in", "batch", "order", "× transfers", "× kernels", "= PIPO ÷ FlexGen",
        "GPU busy: sequential", "layer (FlexGen)", "order", "transfers", "kernels (PIPO)",
        "PIPO over its own layer", "over its own sequential",
    )  # fmt: skip
    return Table("Where the ratio comes from, and how long the GPU computes", columns, [_steps(row) for row in rows])


def _steps(row: Breakdown) -> list[str]:
    chain = (row.flexgen, row.order, row.transfers, row.kernels)
    gains = [_ratio(after, before) for before, after in pairwise(chain)]
    busy = [percent(each.device_busy) for each in (row.flexgen_sequential, *chain)]
    over = [_ratio(row.kernels, other) for other in (row.layer, row.sequential)]
    return [
        *_cell(row.cell), *map(times, gains), times(_ratio(row.kernels, row.flexgen)), *busy, *map(times, over)
    ]  # fmt: skip


def _ratio(one: Prediction, other: Prediction) -> float:
    return one.tokens_per_s / other.tokens_per_s


def flexgen_table(rows: Sequence[FlexgenRow]) -> Table:
    columns = ("system", "model", "schedule", "batch", "published", "predicted", "error", "GPU busy", "left out")
    lines = [_flexgen_line(row) for row in rows]
    last = ["median size of errors", *[""] * 5, percent(median_error(row.error for row in rows)), "", ""]
    return Table("FlexGen's table: tokens/s on the T4", columns, [*lines, last])


def _flexgen_line(row: FlexgenRow) -> list[str]:
    cell = row.cell
    return [
        cell.system, cell.model, cell.schedule, str(cell.policy.batch), rate(cell.tokens_per_s),
        rate(row.predicted.tokens_per_s), signed_percent(row.error), percent(row.predicted.device_busy), cell.note,
    ]  # fmt: skip


def drive_table(figures: Figures) -> Table:
    """FlexGen's largest cell, which lives on what its drive gives, with the other figures one may take for it."""
    cell = next(cell for cell in FLEXGEN_CELLS if cell.system == "FlexGen" and cell.model == "OPT-175B")
    plain = figures.scaled("flexgen.mapped_share", 1 / figures.of("flexgen.mapped_share"))
    ways = {
        "2 GB/s × mapped share (used in the table)": flexgen_on_t4(figures),
        "2 GB/s, as if mapped reads were as fast as plain ones": flexgen_on_t4(plain),
        "0.473 GiB/s, its authors' fit": flexgen_on_t4(plain, "t4-208gb.drive_fitted"),
    }
    lines = []
    for name, system in ways.items():
        found = predict(t4_job(cell, system, figures), cell.schedule).tokens_per_s
        lines.append([name, rate(cell.tokens_per_s), rate(found), signed_percent(found / cell.tokens_per_s - 1)])
    return Table("FlexGen, OPT-175B, by the rate of its drive", ("drive", "published", "predicted", "error"), lines)


def headline_table(rows: Sequence[PipoRow], breakdowns: Sequence[Breakdown]) -> Table:
    ratios = [row.ratio for row in rows]
    published = [row.cell.ratio for row in rows if row.cell.ratio]
    lines = [
        ["GPU busy, FlexGen (layer)", f"below {percent(BUSY_BEFORE)}", _range(row.flexgen for row in breakdowns)],
        ["GPU busy, FlexGen's steps one by one (sequential)", "–", _range(r.flexgen_sequential for r in breakdowns)],
        ["GPU busy, FlexGen's kernels in PIPO's order and transfers", "–", _range(r.transfers for r in breakdowns)],
        ["GPU busy, PIPO (pipelined)", f"above {percent(BUSY_AFTER)}", _range(row.kernels for row in breakdowns)],
        ["PIPO ÷ FlexGen, best", times(BEST_RATIO), times(max(ratios))],
        ["PIPO ÷ FlexGen, median", times(median(published)), times(median(ratios))],
        ["busy at balance over one link: sequential, layer, pipelined", "–", _busy(theory.point(0.0, 1.0))],
        ["busy at balance over drive and link", "–", _busy(theory.through_ram())],
    ]  # fmt: skip
    return Table("The headline", ("", "published", "predicted"), lines)


def _busy(point: theory.Point) -> str:
    return ", ".join(percent(theory.busy(each)) for each in (point.sequential, point.layer, point.pipelined))


def _range(predictions: Iterable[Prediction]) -> str:
    shares = sorted(each.device_busy for each in predictions)
    return f"{percent(shares[0])} to {percent(shares[-1])}, median {percent(median(shares))}"


def theory_tables(points: Sequence[theory.Point]) -> tuple[Table, Table]:
    columns = ("resident", *(f"balance {balance:.2g}" for balance in theory.BALANCES))
    return (
        Table("pipelined over layer", columns, _grid(points, lambda each: each.over_layer)),
        Table("pipelined over sequential", columns, _grid(points, lambda each: each.over_sequential)),
    )


def _grid(points: Sequence[theory.Point], ratio: Callable[[theory.Point], float]) -> list[list[str]]:
    by_place = {(each.resident_share, each.balance): each for each in points}
    return [
        [percent(share), *(times(ratio(by_place[share, balance])) for balance in theory.BALANCES)]
        for share in theory.RESIDENT_SHARES
    ]


def sensitivity_table(base: Summary, found: Sequence[Swing]) -> Table:
    columns = ("figure", "value", "PIPO error", "FlexGen error", "T4 error", "median ratio", "best ratio")
    kinds = [percent] * 3 + [times] * 2
    values = (base.pipo_error, base.flexgen_error, base.t4_error, base.median_ratio, base.best_ratio)
    first = ["as assumed", "", *(kind(value) for kind, value in zip(kinds, values, strict=True))]
    return Table("Each figure at 0.7 and at 1.3 of its value", columns, [first, *(_swing(each) for each in found)])


def _swing(swing: Swing) -> list[str]:
    def both(name: str, text: Callable[[float], str]) -> str:
        low, high = text(getattr(swing.low, name)), text(getattr(swing.high, name))
        return "same" if low == high else f"{low} … {high}"

    errors = [both(name, percent) for name in ("pipo_error", "flexgen_error", "t4_error")]
    ratios = [both(name, times) for name in ("median_ratio", "best_ratio")]
    return [swing.key, f"{swing.value:.4g} {swing.unit}", *errors, *ratios]
