"""From flags to an engine that is ready: what `run` and `chat` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipo.answering import Report
from pipo.base.config import EngineConfig
from pipo.base.units import format_size
from pipo.cli import report
from pipo.cli.flags import OutputFlags
from pipo.cli.terminal import Row, print_note, print_rows, print_warning, stderr
from pipo.engine import Engine
from pipo.hardware.budget import ram_bytes
from pipo.hardware.memory import available_memory, process_memory
from pipo.hardware.predictions import Outcome, keep_outcome
from pipo.hardware.probe import Progress
from pipo.model_file import ModelFile
from pipo.plan import Plan
from pipo.planner.predict import Workload
from pipo.store.library import resolve_model


@dataclass(frozen=True, slots=True)
class Session:
    """A started engine and the plan it keeps to."""

    engine: Engine
    plan: Plan
    output: OutputFlags

    @property
    def last_report(self) -> Report:
        """Of a request that was served."""
        assert self.engine.report is not None
        return self.engine.report

    def print_cost(self, *more: str) -> None:
        """The status line of the last answer and `more` on it, with the causes under --verbose."""
        last = self.engine.report
        if last is None:
            return
        self.warn_of_excess(last.peak_anonymous_bytes)
        self._keep(last)
        if self.output.quiet:
            return
        if stderr().is_terminal:
            stderr().print()
        print_note(" · ".join([report.status_line(self.plan, last), *more]))
        if self.output.verbose:
            self.print_details()

    def _keep(self, last: Report) -> None:
        """How good the prediction was, for answers that there was one for."""
        prediction, plan = self.plan.prediction, self.plan
        if prediction is None or not last.timing.num_decoded:
            return
        keep_outcome(
            Outcome(
                model=str(self.engine.model.path),
                ram_bytes=plan.limit_bytes,
                device=plan.device.device.name if plan.device else "",
                layout=" ".join(plan.repacked_types) or "plain",
                chunk_tokens=plan.placement.chunk.num_tokens,
                predicted_tokens_per_s=prediction.tokens_per_s,
                tokens_per_s=last.tokens_per_s,
                predicted_ttft_s=prediction.ttft_s,
                ttft_s=last.timing.ttft_s,
            )
        )

    def warn_of_excess(self, peak_bytes: int) -> None:
        """A broken promise is said, quiet or not."""
        if peak_bytes > self.plan.limit_bytes:
            peak, limit = format_size(peak_bytes), format_size(self.plan.limit_bytes)
            print_warning(f"the process had {peak} of anonymous memory, more than the limit of {limit}")

    def print_details(self) -> None:
        """Seconds by cause, and who holds the memory."""
        if self.engine.report is not None:
            print_rows(stderr(), "cost", report.detail_rows(self.engine.report))
        self.print_memory()

    def print_memory(self) -> None:
        """Who holds it."""
        print_rows(stderr(), "memory", report.breakdown_rows(self.engine.ledger_breakdown))


def open_model(
    name: str, ram: str | None, *, header_only: bool = False, vocabulary_of: ModelFile | None = None
) -> ModelFile:
    """`ram` is the budget its tokenizer must be built in; None: whatever it takes. Raises ModelError, OverBudget, and
    UsageError where it has not the vocabulary of another model that it must have.
    """
    limit = None if ram is None else ram_bytes(ram)
    return ModelFile(resolve_model(name), limit, header_only=header_only, vocabulary_of=vocabulary_of)


@contextmanager
def open_session(
    model: ModelFile,
    config: EngineConfig,
    context_tokens: int | None,
    output: OutputFlags,
    workload: Workload,
    logprobs_bytes: int = 0,
) -> Iterator[Session]:
    """Plan, print the plan, start. Raises OverBudget before it takes any memory."""

    def make(engine: Engine, say: Progress) -> Plan:
        return engine.make_plan(context_tokens, logprobs_bytes, workload, say)

    with started(model, config, output, make, report.start_rows) as session:
        yield session


@contextmanager
def started(
    model: ModelFile,
    config: EngineConfig,
    output: OutputFlags,
    make: Callable[[Engine, Progress], Plan],
    rows: Callable[[Plan], Iterable[Row]],
) -> Iterator[Session]:
    """Open, `make` a plan, print `rows` of it, start."""
    with Engine(model, config) as engine:
        with starting(output) as say:
            plan = make(engine, say)
            _warn_of_scarcity(plan)
            engine.start(plan)
        if not output.quiet:
            print_rows(stderr(), model_title(model), rows(plan), style="dim")
            stderr().print()
        yield Session(engine, plan, output)


def _warn_of_scarcity(plan: Plan) -> None:
    """A budget is the user's word, also where the machine has less: then the system may end the process."""
    more = plan.placement.num_bytes - process_memory().anonymous_bytes
    available = available_memory()
    if more > available.limit_bytes:
        left = f"{format_size(available.limit_bytes)} left ({available.source})"
        print_warning(f"the plan takes {format_size(more)} more, and there are {left}; --ram auto keeps within that")


@contextmanager
def starting(output: OutputFlags) -> Iterator[Progress]:
    """Show that something goes on: the first run on a machine or drive measures it."""
    if output.quiet or not stderr().is_terminal:
        yield lambda step, fraction: None
        return
    status = stderr().status("starting …", spinner_style="dim")

    def say(step: str, fraction: float) -> None:
        status.update(f"measuring this machine once: {step}, {fraction:.0%} …")

    try:
        status.start()
        yield say
    finally:
        status.stop()


def model_title(model: ModelFile) -> str:
    manifest = model.manifest
    return f"{manifest.name} · {manifest.hyper.architecture} · {types_text(model)} · {format_size(manifest.num_bytes)}"


def types_text(model: ModelFile) -> str:
    """The types that hold the weights, the largest share first; those under a hundredth are left out."""
    sizes = bytes_by_type(model)
    whole = sum(sizes.values())
    return " ".join(name for name, size in sizes.items() if size * 100 >= whole)


def bytes_by_type(model: ModelFile) -> dict[str, int]:
    """Largest first."""
    sizes: dict[str, int] = {}
    for spec in model.manifest.tensors.values():
        sizes[spec.type.name] = sizes.get(spec.type.name, 0) + spec.num_bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
