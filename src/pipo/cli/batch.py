"""`pipo batch`: answer every row of a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.base.errors import UsageError
from pipo.cli.flags import (
    ComputeFlags,
    MemoryFlags,
    ModelFlag,
    OutputFlags,
    SamplingFlags,
    SystemFlag,
    make_config,
    parse_num_sequences,
)

if TYPE_CHECKING:
    from pipo.generation.request import ConstraintSpec
    from pipo.jobs.batch import Batch, StartEngine
    from pipo.jobs.ray_engines import RayPlace

MAX_TEMPLATE_BYTES = 1 << 20


def batch(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL INPUT",
            help="A model, and a table: .jsonl, .csv, .parquet or a folder of text files.",
            show_default=False,
        ),
    ] = None,
    model_flag: ModelFlag = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE|FOLDER", help="Where the answers go: the input's kind of table."),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(metavar="FILE|TEXT", help="Jinja over the columns: 'Summarise: {{ text }}', or a file of it."),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with the prompt, or with a list of messages.")
    ] = None,
    system: SystemFlag = None,
    raw: Annotated[bool, typer.Option("--raw", help="Prompts as they are, without chat template.")] = False,
    num_sequences: Annotated[
        str, typer.Option(metavar="N|auto", help="Answers at a time, which share every sweep of the weights.")
    ] = "auto",
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answers are JSON that follows this JSON schema.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N rows alone.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a job that was stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output or a journal that is there.")
    ] = False,
    column_prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Before the names of the new columns: answer, error, …")
    ] = "",
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|auto|local", help="Engines on the nodes of a Ray cluster, one on each."),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --ray: so many engines, not one on each node.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="What happens, as JSON lines on stdout.")] = False,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
    compute: ComputeFlags,
    sampling: SamplingFlags,
) -> None:
    """Answer every row of a table, within a memory budget; many rows share each sweep of the weights.

    The output is the input's kind of table, with the answers as new columns. It appears when it is complete; until
    then `OUTPUT.journal` keeps every answer, and --resume goes on after any stop. Exit code 3: some rows have an error.
    """
    name, table = _sort_words(words or [], model_flag)
    if out is None:
        raise UsageError("where do the answers go?", hint="-o FILE, of the input's kind")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other", hint="leave one of them out")
    if system is not None and raw:
        raise UsageError("--system needs the chat template, which --raw leaves out")
    if prompt_template is not None and prompt_column is not None:
        raise UsageError("--prompt-template and --prompt-column contradict each other", hint="leave one of them out")
    if ray_workers is not None and ray is None:
        raise UsageError("--ray-workers needs --ray", hint="--ray local starts Ray on this machine")
    config = make_config(memory, compute)
    params, wanted = sampling.params(sampling.max_tokens), parse_num_sequences(num_sequences)

    from pipo.cli.batch_report import looking_at
    from pipo.jobs.answers import AnswerNames
    from pipo.jobs.batch import Batch, BatchSettings
    from pipo.jobs.prompts import PromptSettings
    from pipo.jobs.ray_engines import RayPlace
    from pipo.store.library import resolve_model

    template = None if prompt_template is None else read_template(prompt_template)
    prompts = PromptSettings(params, template, prompt_column, system, raw, _constraint(schema))
    settings = BatchSettings(
        model=resolve_model(name),
        table=table,
        output=out,
        config=config,
        prompts=prompts,
        num_sequences=wanted,
        num_rows=limit,
        names=AnswerNames.prefixed(column_prefix),
        is_resumed=resume,
        is_overwritten=overwrite,
    )
    with looking_at(table, output):
        job = Batch(settings)
    with job:
        _run(job, output, None if ray is None else RayPlace(ray, ray_workers), json=json)


def _run(job: Batch, output: OutputFlags, place: RayPlace | None, *, json: bool) -> None:
    """Raises RowsFailed where a row has an error."""
    import asyncio

    from pipo.base.errors import RowsFailed
    from pipo.cli.batch_report import BatchReport
    from pipo.jobs.engine_plan import start_engine

    with BatchReport(job, output, json=json, is_elsewhere=place is not None) as report:
        if not job.is_complete:
            start = start_engine if place is None else _start_workers(job, place)
            asyncio.run(job.run(start, report.start, report.tick, is_elsewhere=place is not None))
        job.publish()
        report.end()
    if job.tally.num_failed:
        raise RowsFailed(
            f"{job.tally.num_failed} of {job.num_rows} rows have an error; the first: {job.tally.first_error!s:.400}",
            hint=f"{job.settings.output} says for each what it is",
        )


def _start_workers(job: Batch, place: RayPlace) -> StartEngine:
    """Each node finds out for itself what `--ram` comes to there, and how many sequences pay."""
    from dataclasses import replace

    from pipo.jobs.engine_plan import EngineSpec
    from pipo.jobs.ray_engines import RayEngines
    from pipo.serving.contract import EngineClient

    async def start(spec: EngineSpec) -> EngineClient:
        own = replace(spec, config=replace(spec.config, ram=job.settings.config.ram))
        return await RayEngines.start(place, own, job.settings.num_sequences)

    return start


def _sort_words(words: list[str], model: str | None) -> tuple[str, Path]:
    left = list(words)
    name = model if model is not None else left.pop(0) if left else None
    if name is None:
        raise UsageError(
            "which model?", hint="pipo batch MODEL INPUT -o OUTPUT; `pipo list` shows the models there are"
        )
    if not left:
        raise UsageError("which table?", hint="pipo batch MODEL INPUT -o OUTPUT")
    if len(left) > 1:
        raise UsageError(f"one word too many: {left[1]!r}", hint="pipo batch MODEL INPUT -o OUTPUT")
    return name, Path(left[0])


def read_template(given: str) -> str:
    """The text itself, where it looks like Jinja, else the file of this name. Raises UsageError."""
    if "{{" in given or "{%" in given:
        return given
    return _read_text("--prompt-template", Path(given), "a file, or a text with {{ column }} in it")


def _read_text(flag: str, path: Path, wanted: str) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise UsageError(f"{flag} {path}: is larger than {MAX_TEMPLATE_BYTES} bytes", hint=f"wanted {wanted}")
        return data.decode()
    except OSError as error:
        raise UsageError(f"{flag} {path!s:.200}: {error.strerror}", hint=f"wanted {wanted}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path}: is not UTF-8 text, byte {error.start}", hint=f"wanted {wanted}") from error


def _constraint(schema: Path | None) -> ConstraintSpec | None:
    """Raises UsageError for what is no JSON schema that answers can follow."""
    if schema is None:
        return None
    from pipo.generation.request import ConstraintKind, ConstraintSpec
    from pipo.jobs.children import run_in_child

    spec = ConstraintSpec(ConstraintKind.JSON_SCHEMA, _read_text("--schema", schema, "a JSON schema"))
    run_in_child(_check_schema, str(schema), spec)  # elsewhere: the library stays out of this process
    return spec


def _check_schema(name: str, spec: ConstraintSpec) -> None:
    from pipo.generation.constraints import check_constraint

    try:
        check_constraint(spec)
    except UsageError as error:
        raise UsageError(f"--schema {name}: {error.message}", hint=error.hint) from error
