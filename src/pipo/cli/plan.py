"""`pipo plan`: who would live where and how fast it would be, on this machine or another, before there are weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.base.errors import ContextOverflow, UsageError
from pipo.cli.flags import ComputeFlags, JsonFlag, MemoryFlags, ModelArgument, ModelFlag, OutputFlags, make_config
from pipo.cli.prompt import only_model

if TYPE_CHECKING:
    from pipo.base.config import EngineConfig
    from pipo.cli.header import Opened
    from pipo.hardware.probe import Progress
    from pipo.model_file import ModelFile
    from pipo.outlook import Case, Change, Outlook
    from pipo.plan import Plan
    from pipo.planner.batch import BatchCurve
    from pipo.planner.experts import ExpectedRouting
    from pipo.planner.predict import Workload

PROMPT_TOKENS = ANSWER_TOKENS = 256  # where nobody says
MAX_BATCH = 1 << 16


def plan(
    model: ModelArgument = None,
    model_flag: ModelFlag = None,
    machine: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Plan for that machine: one that comes with pipo, or a profile's file."),
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, metavar="N", help="Sequences at a time.")] = 1,
    advise: Annotated[bool, typer.Option("--advise", help="Also tokens per second by batch size.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="With --advise: the curve as a picture.")] = None,
    experts: Annotated[
        Path | None, typer.Option(metavar="TRACE", help="Which experts a run passed: from `pipo run --expert-trace`.")
    ] = None,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
    compute: ComputeFlags,
) -> None:
    """Say who would live where, how fast it would be, what limits it and what would help.

    Needs the model's header alone, and reads that from the hub where the model was not pulled. Without --machine: this
    machine, measured once where it was not yet.
    """
    name = only_model(model, model_flag)
    _check_flags(machine, memory, compute, advise, svg)
    config = make_config(memory, compute)

    from pipo.cli.header import opened_header
    from pipo.cli.session import starting
    from pipo.outlook import Outlook

    with opened_header(name, output) as header:
        opened = header.model
        if machine is not None:
            config = _config_elsewhere(config, machine, compute)
        trained = opened.manifest.hyper.context_tokens
        workload, context = fit_workload(config.context_tokens, prompt_tokens, answer_tokens, batch, trained)
        routing = None if experts is None else _routing(experts, opened)
        with Outlook(opened, config, routing) as outlook, starting(output) as say:
            case = _case(outlook, machine, memory, workload, context, say)
            found = _find(outlook, case, advise=advise)
        if svg is not None:
            _draw(svg, opened, case, found.curve)
        _show(header, case, found, json)


def _check_flags(
    machine: str | None, memory: MemoryFlags, compute: ComputeFlags, advise: bool, svg: Path | None
) -> None:
    if svg is not None and not advise:
        raise UsageError("--svg needs --advise", hint="it draws the curve of tokens per second by batch size")
    if svg is not None and not svg.absolute().parent.is_dir():
        raise UsageError(f"--svg {svg}: there is no folder {svg.absolute().parent}")
    if machine is not None and compute.threads is not None:
        raise UsageError(
            "--threads and --machine contradict each other", hint="a profile's figures are of the threads it names"
        )


def _routing(file: Path, model: ModelFile) -> ExpectedRouting:
    """Raises MalformedTrace, and UsageError for the trace of another model."""
    from pipo.pipeline.expert_trace import read_trace, routing_of

    hyper, trace = model.manifest.hyper, read_trace(file)
    wanted, found = (
        (hyper.num_experts, hyper.num_experts_per_tok),
        (trace.head.num_experts, trace.head.num_experts_per_tok),
    )
    if wanted != found:
        raise UsageError(
            f"--experts {file}: is of a model with {found[0]} experts a block, {found[1]} of them a token; "
            f"{model.manifest.name} has {wanted[0]} and {wanted[1]}",
            hint="pipo run --expert-trace FILE with this model records one",
        )
    return routing_of(trace, str(file))


def _config_elsewhere(config: EngineConfig, machine: str, compute: ComputeFlags) -> EngineConfig:
    """Without what settings say of this machine's devices; the threads are the profile's."""
    from dataclasses import replace

    from pipo.base.config import MAX_THREADS
    from pipo.hardware import profiles

    threads = min(profiles.find(machine).cpu.num_threads, MAX_THREADS)
    return replace(config, device=compute.device or "auto", threads=threads)


def _case(
    outlook: Outlook,
    machine: str | None,
    memory: MemoryFlags,
    workload: Workload,
    context_tokens: int,
    on_probe: Progress,
) -> Case:
    from pipo.hardware import profiles

    if machine is None:
        case = outlook.case_here(workload, context_tokens, on_probe)
    else:
        profile = profiles.find(machine)
        case = outlook.case_elsewhere(profile, memory.ram, memory.vram, workload, context_tokens)
        _warn_of_more_than_there_is(case)
    if memory.vram is not None and case.device is None:
        raise UsageError(f"--vram {memory.vram}: {case.machine.name} has no device besides the CPU")
    return case


def _warn_of_more_than_there_is(case: Case) -> None:
    """What a machine does not have may be planned with all the same: it could be bought."""
    from pipo.base.units import format_size
    from pipo.cli.terminal import print_warning

    device = case.machine.devices[1] if case.device is not None else None
    for flag, limit, there in (
        ("--ram", case.ram_bytes, case.machine.ram_bytes),
        ("--vram", case.vram_bytes, device.memory_bytes if device else case.vram_bytes),
    ):
        if limit > there:
            print_warning(f"{flag} {format_size(limit)} is more than the {format_size(there)} that the machine has")


def fit_workload(
    context: int | None, prompt: int | None, answer: int | None, batch: int, trained: int
) -> tuple[Workload, int]:
    """What to predict for, and the context of each sequence.

    Without --prompt-tokens the prompt fills a context that was asked for. Raises ContextOverflow.
    """
    from pipo.planner.predict import Workload

    most = context or trained
    answer_tokens = answer or max(min(ANSWER_TOKENS, most - prompt if prompt else most // 2), 1)
    prompt_tokens = prompt or max(most - answer_tokens if context else min(PROMPT_TOKENS, most - answer_tokens), 1)
    if prompt_tokens + answer_tokens > most:
        whose = "the context of" if context else "the model's context of"
        raise ContextOverflow(
            f"a prompt of {prompt_tokens} tokens and an answer of {answer_tokens} do not fit {whose} {most}",
            hint="a shorter prompt or answer" + (", or a larger -c" if context and context < trained else ""),
        )
    return Workload(prompt_tokens, answer_tokens, batch), context or prompt_tokens + answer_tokens


@dataclass(frozen=True, slots=True)
class Found:
    """All that is to be shown. `curve` is there with --advise."""

    plan: Plan
    changes: Sequence[Change]
    curve: BatchCurve | None


def _find(outlook: Outlook, case: Case, *, advise: bool) -> Found:
    found = outlook.plan(case)
    if found.prediction is None:
        return Found(found, [], None)
    changes = outlook.what_would_help(case, found)
    return Found(found, changes, outlook.batch_curve(case) if advise else None)


def _show(header: Opened, case: Case, found: Found, json: bool) -> None:
    from pipo.cli import curve, plan_report
    from pipo.cli.terminal import write_json

    if json:
        batch = None if found.curve is None else curve.as_dict(found.curve)
        plan = plan_report.as_dict(header.model, case, found.plan, found.changes)
        write_json(plan | {"model": header.shown, "batch": batch})
        return
    plan_report.print_plan(header.model, case, found.plan, found.changes)
    if found.curve is not None:
        plan_report.print_curve(found.curve)


def _draw(file: Path, model: ModelFile, case: Case, curve: BatchCurve | None) -> None:
    from pipo.cli.curve import picture
    from pipo.cli.plan_report import titles

    if curve is None:
        raise UsageError(f"--svg {file}: nothing to draw, the device's speed is not known", hint="pipo doctor --probe")
    try:
        file.write_text(picture(curve, *titles(model, case)), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--svg {file}: cannot be written: {error.strerror}") from error
