"""`pipo eval`: the perplexity of a text, and how far a model's predictions are from another model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.base.errors import OverBudget, UsageError
from pipo.cli.flags import ComputeFlags, JsonFlag, MemoryFlags, ModelFlag, OutputFlags, make_config

if TYPE_CHECKING:
    from pipo.base.config import EngineConfig
    from pipo.cli.eval_report import Findings, Run
    from pipo.engine import Engine
    from pipo.generation.scoring import Likelihoods
    from pipo.generation.windows import Windows
    from pipo.generation.worker import Stream
    from pipo.hardware.probe import Progress
    from pipo.model_file import ModelFile
    from pipo.plan import Plan

WINDOW_TOKENS = 512  # llama-perplexity's default
LEAST_WINDOW_TOKENS = 8  # of which three are scored


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL FILE", help="A .gguf file or a known name, and a UTF-8 text.", show_default=False
        ),
    ] = None,
    model_flag: ModelFlag = None,
    file_flag: Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="The text, as a flag.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also the KL divergence from this model, which is run first."),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", "--chunks", min=1, metavar="N", help="The first N windows alone.")
    ] = None,
    tmp_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For the other model's predictions; pipo's cache folder otherwise."),
    ] = None,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
    memory: MemoryFlags,
    compute: ComputeFlags,
) -> None:
    """Perplexity of a text, within a memory budget; with --against, KL divergence from another model.

    The text is cut into windows of -c tokens (512), of each of which the second half is scored: the figures compare
    with llama-perplexity's.
    """
    name, file = _sort_words(words or [], model_flag, file_flag)
    if tmp_dir is not None and against is None:
        raise UsageError("--tmp-dir needs --against", hint="without another model there is nothing to keep")
    size = memory.ctx_size or WINDOW_TOKENS
    if size < LEAST_WINDOW_TOKENS:
        raise UsageError(f"-c {size} is too small: a window has {LEAST_WINDOW_TOKENS} tokens at least")
    config = _with_fixed_budget(make_config(memory, compute))

    from pipo.base.folders import cache_folder
    from pipo.cli import eval_report
    from pipo.cli.session import open_model

    opened = open_model(name, config.ram)
    other = None if against is None else open_model(against, config.ram, vocabulary_of=opened)
    for each in (opened, other):
        _check_context(each, size)
    windows = cut_windows(file, opened, size, max_windows)
    task = Task(windows, config, output, tmp_dir or cache_folder())
    with _saying_what_is_known(task):
        findings = task.run(opened, other)
    eval_report.show(findings, opened, other, file, json=json)


def _sort_words(words: list[str], model: str | None, file: str | None) -> tuple[str, Path]:
    left = list(words)
    name = model if model is not None else left.pop(0) if left else None
    if name is None:
        raise UsageError("which model?", hint="pipo eval MODEL FILE; `pipo list` shows the models there are")
    text = file if file is not None else left.pop(0) if left else None
    if text is None:
        raise UsageError("which text?", hint="pipo eval MODEL FILE: a UTF-8 text of some thousand words")
    if left:
        raise UsageError(f"one word too many: {left[0]!r}", hint="pipo eval MODEL FILE")
    return name, Path(text)


def _with_fixed_budget(config: EngineConfig) -> EngineConfig:
    """What "auto" or a share comes to now: the second model is to have what the first one had."""
    from pipo.hardware.budget import ram_bytes

    return replace(config, ram=str(max(ram_bytes(config.ram), 1)))


def _check_context(model: ModelFile | None, size: int) -> None:
    if model is not None and size > model.manifest.hyper.context_tokens:
        trained = model.manifest.hyper.context_tokens
        raise UsageError(
            f"{model.path}: windows of {size} tokens exceed the {trained} the model was trained for",
            hint=f"-c {trained} is the most",
        )


def cut_windows(file: Path, model: ModelFile, size: int, max_windows: int | None) -> Windows:
    """Whole windows of the text, `max_windows` at most. Raises UsageError where there are not two."""
    from pipo.generation.windows import Windows
    from pipo.hardware.memory import release_free_memory
    from pipo.text.text_file import encode_file

    most_tokens = max(max_windows, 2) * size if max_windows else 1 << 40
    ids = encode_file(file, model.tokenizer, most_tokens)
    release_free_memory()
    if len(ids) < 2 * size:
        hint = f"a longer text, or -c {len(ids) // 2}" if len(ids) // 2 >= LEAST_WINDOW_TOKENS else "a longer text"
        raise UsageError(
            f"{file}: wanted {2 * size} tokens, two windows of {size}, at least, found {len(ids)}", hint=hint
        )
    num_windows = min(len(ids) // size, max_windows or len(ids))
    begin = next(iter(model.tokenizer.begin_ids), None)
    return Windows(ids, size, num_windows, begin)


@dataclass(slots=True)
class Task:
    """One evaluation. `known` is what the run that goes on has measured so far."""

    windows: Windows
    config: EngineConfig
    output: OutputFlags
    tmp_dir: Path
    known: Likelihoods | None = None
    is_reference: bool = False

    def run(self, model: ModelFile, other: ModelFile | None) -> Findings:
        """The budget is known to do for both before one runs. Raises OverBudget, UsageError, TransferError."""
        from pipo.cli.eval_report import Findings
        from pipo.generation.scoring import Likelihoods

        if other is not None:
            self._check_budget([model, other])
            return self._compare(model, other)
        scorer = Likelihoods(self.windows, model.manifest.hyper.vocab_size)
        return Findings(self.windows, scorer, self._score(model, scorer))

    def _compare(self, model: ModelFile, other: ModelFile) -> Findings:
        from pipo.cli.eval_report import Findings
        from pipo.generation.logprob_file import LogprobFile
        from pipo.generation.scoring import Comparer, Recorder

        vocab_size = model.manifest.hyper.vocab_size
        with LogprobFile(self.tmp_dir, self.windows.num_scored, vocab_size) as kept:
            recorder = Recorder(self.windows, vocab_size, kept)
            self.is_reference = True
            first = self._score(other, recorder)
            kept.rewind()
            comparer = Comparer(self.windows, vocab_size, recorder, kept)
            self.is_reference = False
            return Findings(self.windows, comparer, self._score(model, comparer), comparer, first)

    def _check_budget(self, models: Sequence[ModelFile]) -> None:
        """Raises OverBudget naming what does for all."""
        from pipo.engine import Engine

        refusals = []
        for model in models:
            try:
                with Engine(model, self.config) as engine:
                    engine.plan_windows(self.windows, self._kept_bytes(model))
            except OverBudget as error:
                refusals.append(error)
        if refusals:
            raise max(refusals, key=lambda error: error.smallest_bytes or 0)

    def _kept_bytes(self, model: ModelFile) -> int:
        from pipo.generation.scoring import scoring_bytes

        return scoring_bytes(self.windows, model.manifest.hyper.vocab_size)

    def _score(self, model: ModelFile, scorer: Likelihoods) -> Run:
        from functools import partial

        from pipo.cli import eval_report
        from pipo.cli.session import started
        from pipo.hardware.memory import release_free_memory

        self.known = scorer
        release_free_memory()  # of an engine before this one
        kept_bytes, rows = self._kept_bytes(model), partial(eval_report.start_rows, self.windows)

        def make(engine: Engine, say: Progress) -> Plan:
            return engine.plan_windows(self.windows, kept_bytes)

        with started(model, self.config, self.output, make, rows) as session:
            seconds = self._watch(session.engine.score(self.windows, scorer), scorer)
            run = eval_report.Run(session.plan, session.last_report, seconds)
            session.warn_of_excess(run.report.peak_anonymous_bytes)
            if not self.output.quiet:
                eval_report.print_cost(session, run)
            return run

    def _watch(self, passes: Stream[int], scorer: Likelihoods) -> float:
        """Seconds until all are over."""
        import time

        from pipo.cli.eval_report import so_far
        from pipo.cli.progress import progress_display

        total, done, begin = self.windows.num_computed, 0, time.monotonic()
        display = progress_display("reference" if self.is_reference else "evaluating", total, self.output)
        try:
            display.start()
            with closing(passes) as running:
                for num_tokens in running:
                    done += num_tokens
                    display.advance(done, total, so_far(scorer))
        finally:
            display.stop()
        return time.monotonic() - begin


@contextmanager
def _saying_what_is_known(task: Task) -> Iterator[None]:
    """Ctrl-C and SIGTERM, or a drive that fails, leave what was measured so far said, on stderr."""
    from pipo.cli.eval_report import print_partial

    try:
        yield
    except BaseException:
        if task.known is not None:
            print_partial(task.windows, task.known, is_reference=task.is_reference)
        raise
