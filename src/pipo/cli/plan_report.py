"""What `pipo plan` found, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipo.base.units import format_rate, format_size
from pipo.cli.curve import BATCH_NOTE, advice, plot_lines
from pipo.cli.report import LANE_NAMES, breakdown_rows, plan_rows, rate_text, routing_rows, seconds_text
from pipo.cli.session import model_title
from pipo.cli.terminal import Row, print_columns, print_rows, stdout
from pipo.model_file import ModelFile
from pipo.outlook import Case, Change
from pipo.plan import Plan
from pipo.plan_facts import homed_plan_dict, prediction_dict
from pipo.planner.batch import BatchCurve, busiest
from pipo.planner.predict import Prediction
from pipo.planner.simulate import Lane

LEAST_GAIN = 0.01  # of what is said to help


def print_plan(model: ModelFile, case: Case, plan: Plan, changes: Sequence[Change]) -> None:
    print_rows(stdout(), model_title(model), [*_machine_rows(case), *plan_rows(plan), *_prediction_rows(case, plan)])
    stdout().print()
    print_columns(stdout(), ("memory", "size"), list(breakdown_rows(plan.placement.breakdown)), indent="  ")
    if plan.device is not None:
        stdout().print()
        rows = list(breakdown_rows(plan.device.placement.breakdown))
        print_columns(stdout(), (f"memory of {plan.device.device.name}", "size"), rows, indent="  ")
    if plan.prediction is not None:
        stdout().print()
        print_rows(stdout(), "what would help most", _change_rows(changes))


def print_curve(curve: BatchCurve) -> None:
    stdout().print()
    print_rows(stdout(), "batch", advice(curve))
    stdout().print()
    for each in plot_lines(curve):
        stdout().print(f"  {each}")


def titles(model: ModelFile, case: Case) -> tuple[str, str, str]:
    """Of a picture: the model, and what the figures are of."""
    workload = case.workload
    machine = f"{case.machine.name}, {format_size(case.ram_bytes)} of RAM"
    if case.device is not None:
        machine += f", {format_size(case.vram_bytes)} of device memory"
    tokens = f"prompts of {workload.prompt_tokens}, answers of {workload.answer_tokens} tokens"
    return f"{model.manifest.name}: tokens per second by batch size", machine, f"{tokens}, predicted"


def _machine_rows(case: Case) -> Iterator[Row]:
    machine = case.machine
    yield (
        "machine",
        f"{machine.name}: drive {format_rate(machine.drive.bytes_per_s)}, {machine.cpu.num_threads} threads",
    )
    yield "figures", machine.source


def _prediction_rows(case: Case, plan: Plan) -> Iterator[Row]:
    workload = case.workload
    if case.device is not None and plan.device is None:
        yield "device", f"{case.device.name} is left out: it has too little memory for this, or the CPU alone is sooner"
    sequences = "1 sequence" if workload.num_sequences == 1 else f"{workload.num_sequences} sequences at a time"
    yield "workload", f"{sequences}, prompts of {workload.prompt_tokens} tokens, answers of {workload.answer_tokens}"
    if workload.num_sequences > 1:
        yield "", BATCH_NOTE
    if plan.prediction is None:
        assert plan.device is not None
        yield "expect", f"nothing: the machine's profile has no figures of {plan.device.device.name}"
        return
    prediction = plan.prediction
    yield from routing_rows(plan)
    whole = seconds_text(prediction.total_s)
    yield (
        "expect",
        (
            f"{rate_text(prediction.tokens_per_s)} tokens/s, first token after {seconds_text(prediction.ttft_s)}, "
            f"the whole answer after {whole}"
        ),
    )
    yield "busy", ", ".join(f"{LANE_NAMES[lane]} {share:.0%}" for lane, share in _shares(prediction).items())
    yield "limit", limit_text(case, plan)


def _shares(prediction: Prediction) -> dict[Lane, float]:
    """Of decode's time, by lane; those that do nothing are left out."""
    return {lane: prediction.decode.share(lane) for lane in LANE_NAMES if prediction.decode.busy[lane]}


def limit_text(case: Case, plan: Plan) -> str:
    """The lane that decode leaves the least idle, and what it does."""
    assert plan.prediction is not None
    lane = busiest(plan.prediction)
    share = plan.device.placement if plan.device else None
    if lane is Lane.DRIVE:
        read = plan.in_use.streamed_bytes + int(plan.prediction.expert_bytes)
        what = f"the drive, which reads {format_size(read)} for every pass"
    elif lane is Lane.UPLOAD:
        copied = share.streamed_bytes if share else 0
        what = f"the link to the device, which carries {format_size(copied)} of weights in every pass"
        what += " and keys and values" if share and share.moves_kv else ""
    elif lane is Lane.DOWNLOAD:
        what = "the link from the device, which carries new keys and values"
    else:
        name = case.machine.devices[1].name if lane is Lane.DEVICE else "the CPU"
        what = f"{name}, which computes"
    return f"{what}: busy for {plan.prediction.decode.share(lane):.0%} of decode"


def _change_rows(changes: Sequence[Change]) -> Iterator[Row]:
    helping = [change for change in changes if change.gain >= LEAST_GAIN]
    for change in helping:
        yield f"+{change.gain:.0%}", f"{change.what}: {rate_text(change.tokens_per_s)} tokens/s"
    others = [change.what for change in changes if change.gain < LEAST_GAIN]
    if others:
        yield "nothing", f"is gained by {'; '.join(others)}"


def as_dict(model: ModelFile, case: Case, plan: Plan, changes: Sequence[Change]) -> dict[str, object]:
    return {
        "model": str(model.path),
        "machine": {"name": case.machine.name, "source": case.machine.source},
        "workload": {
            "prompt_tokens": case.workload.prompt_tokens,
            "answer_tokens": case.workload.answer_tokens,
            "num_sequences": case.workload.num_sequences,
        },
        "plan": homed_plan_dict(model, plan),
        "prediction": None if plan.prediction is None else _prediction_dict(case, plan, plan.prediction),
        "what_would_help": [
            {"what": change.what, "tokens_per_s": change.tokens_per_s, "gain": change.gain} for change in changes
        ],
    }


def _prediction_dict(case: Case, plan: Plan, prediction: Prediction) -> dict[str, object]:
    return prediction_dict(prediction) | {
        "limit": {"lane": busiest(prediction).value, "text": limit_text(case, plan)},
    }
