"""What an evaluation found, in words and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipo.answering import Report
from pipo.base.units import format_rate, format_size
from pipo.cli.report import layout_text, part_text, plan_rows, rate_text, seconds_text, stats_dict, stats_text
from pipo.cli.session import Session
from pipo.cli.terminal import Row, print_note, print_rows, stderr, stdout, write_json
from pipo.generation.scoring import (
    Comparer,
    Divergence,
    Estimate,
    Likelihoods,
    Perplexity,
    divergence_of,
    mean_of,
    perplexity_of,
)
from pipo.generation.windows import Windows
from pipo.model_file import ModelFile
from pipo.plan import Plan
from pipo.plan_facts import plan_dict


@dataclass(frozen=True, slots=True)
class Run:
    """One model's pass over all windows."""

    plan: Plan
    report: Report
    seconds: float


@dataclass(frozen=True, slots=True)
class Findings:
    """`comparer` and `reference` are there where two models were held against each other."""

    windows: Windows
    scorer: Likelihoods
    run: Run
    comparer: Comparer | None = None
    reference: Run | None = None


def start_rows(windows: Windows, plan: Plan) -> Iterator[Row]:
    """What is said before a run."""
    yield from (row for row in plan_rows(plan) if row[0] not in ("prefill", "decode"))
    chunk, max_outputs = plan.placement.chunk.num_tokens, plan.blueprint.num_outputs
    each = sum(1 for _ in windows.passes(chunk, max_outputs))
    yield (
        "passes",
        f"{each} a window, of {chunk} tokens, {min(max_outputs, chunk)} of them scored, at most, {layout_text(plan)}",
    )
    yield (
        "windows",
        f"{windows.num_windows} of {windows.size} tokens, {windows.num_scored} tokens scored",
    )


def so_far(scorer: Likelihoods) -> str:
    """For a progress bar. Threads: any, while the scorer goes on."""
    nll = scorer.nll
    return f"perplexity {_number(math.exp(min(float(nll.mean()), 700.0)))}" if len(nll) else ""


def print_partial(windows: Windows, scorer: Likelihoods, *, is_reference: bool) -> None:
    """What a run that was stopped had found."""
    num = scorer.num_scored
    if num < 2 or (num == windows.num_scored and not is_reference):
        return
    whose = " of the reference" if is_reference else ""
    text = f"stopped after {num} of {windows.num_scored} tokens{whose}: perplexity "
    text += _estimate(perplexity_of(scorer.nll, 0).perplexity)
    if isinstance(scorer, Comparer):
        text += f", KL divergence {_estimate(mean_of(scorer.divergence))} nats"
    print_note(text)


def print_cost(session: Session, run: Run) -> None:
    stats, plan = run.report.prefill, run.plan
    rate = run.report.timing.prefill_tokens / run.seconds if run.seconds else 0.0
    parts = [f"{seconds_text(run.seconds)}, {rate_text(rate)} tok/s"]
    if stats.bytes_read:
        each = format_size(stats.bytes_read / max(stats.num_passes, 1))
        parts.append(f"{each}/pass at {format_rate(stats.bytes_per_s)}")
        parts.append(f"stalled {stats.stall_share:.0%}")
    parts.append(f"peak {part_text(run.report.peak_anonymous_bytes, plan.limit_bytes)}")
    if stderr().is_terminal:
        stderr().print()
    print_note(" · ".join(parts))
    if session.output.verbose:
        print_rows(stderr(), "cost", [("passes", stats_text(stats))])
        session.print_memory()


def show(findings: Findings, model: ModelFile, other: ModelFile | None, file: Path, *, json: bool) -> None:
    """On stdout."""
    num_bytes = sum(len(model.tokenizer.token_bytes(token)) for token in findings.windows.scored_tokens())
    ours = perplexity_of(findings.scorer.nll, num_bytes)
    compared = None
    if findings.comparer is not None:
        theirs = perplexity_of(findings.comparer.reference.nll, num_bytes)
        compared = theirs, divergence_of(findings.comparer)
    if json:
        write_json(_as_dict(findings, ours, compared, model, other, file))
        return
    print_rows(stdout(), f"{model.path.name} on {file.name}", _rows(ours))
    if compared is not None and other is not None:
        stdout().print()
        print_rows(stdout(), f"against {other.path.name}", _divergence_rows(*compared))


def _rows(found: Perplexity) -> Iterator[Row]:
    yield "perplexity", _estimate(found.perplexity)
    yield "mean NLL", f"{_estimate(found.nll)} nats a token, {_number(found.bits_per_byte)} bits a byte"
    yield "scored", f"{found.num_tokens} tokens"


def _divergence_rows(theirs: Perplexity, found: Divergence) -> Iterator[Row]:
    yield "perplexity", _estimate(theirs.perplexity)
    yield "ratio", f"{_estimate(found.ratio)}, difference {_estimate(found.difference)}"
    yield "KL", f"{_estimate(found.kl)} nats a token"
    yield (
        "",
        f"median {_number(found.kl_median)}, 99% {_number(found.kl_99)}, 99.9% {_number(found.kl_999)}, "
        + (f"most {_number(found.kl_max)}"),
    )
    same = found.same_top
    yield "same top", f"{same.value:.2%} ± {same.error:.2%} of the likeliest tokens"


def _number(value: float) -> str:
    """Six digits: enough to see a difference of a thousandth of its error."""
    return f"{value:.6g}"


def _estimate(found: Estimate) -> str:
    """The error in three digits, the value as far."""
    if not math.isfinite(found.error) or not found.error or not math.isfinite(found.value):
        return f"{_number(found.value)} ± {found.error:.2g}"
    digits = min(max(3 - math.floor(math.log10(found.error)) - 1, 0), 12)
    return f"{found.value:.{digits}f} ± {found.error:.{digits}f}"


def _as_dict(
    findings: Findings,
    ours: Perplexity,
    compared: tuple[Perplexity, Divergence] | None,
    model: ModelFile,
    other: ModelFile | None,
    file: Path,
) -> dict[str, object]:
    windows = findings.windows
    found: dict[str, object] = {
        "model": str(model.path),
        "file": str(file),
        "window_tokens": windows.size,
        "num_windows": windows.num_windows,
        "num_scored_tokens": ours.num_tokens,
        **_perplexity_dict(ours),
        "plan": plan_dict(findings.run.plan),
        "cost": _cost_dict(findings.run),
    }
    if compared is not None and findings.reference is not None and other is not None:
        theirs, divergence = compared
        found["against"] = {
            "model": str(other.path),
            **_perplexity_dict(theirs),
            **_divergence_dict(divergence),
            "plan": plan_dict(findings.reference.plan),
            "cost": _cost_dict(findings.reference),
        }
    return found


def _perplexity_dict(found: Perplexity) -> dict[str, object]:
    return {
        "perplexity": _estimate_dict(found.perplexity),
        "mean_nll_nats": _estimate_dict(found.nll),
        "bits_per_byte": _finite(found.bits_per_byte),
    }


def _divergence_dict(found: Divergence) -> dict[str, object]:
    return {
        "kl_nats": {
            **_estimate_dict(found.kl),
            "median": found.kl_median,
            "percentile_99": found.kl_99,
            "percentile_99_9": found.kl_999,
            "max": found.kl_max,
        },
        "same_top": _estimate_dict(found.same_top),
        "perplexity_ratio": _estimate_dict(found.ratio),
        "log_perplexity_ratio": _estimate_dict(found.log_ratio),
        "perplexity_difference": _estimate_dict(found.difference),
    }


def _estimate_dict(found: Estimate) -> dict[str, object]:
    return {"value": _finite(found.value), "error": _finite(found.error)}


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _cost_dict(run: Run) -> dict[str, object]:
    return {
        "seconds": run.seconds,
        "peak_anonymous_bytes": run.report.peak_anonymous_bytes,
        "passes": stats_dict(run.report.prefill),
    }
