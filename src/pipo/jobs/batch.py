"""A batch job from its settings to its output: look, begin or resume, answer, publish.

Processes: this one has the event loop, the journal and what is said; the reader prepares rows ahead; the engine
computes. All of them count against `--ram`. What this one and the reader have is measured once the reader's first
window is ready, before there is an engine: that and GROWTH_BYTES, but BESIDES_BYTES at least, are theirs. The engine
has the rest.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType

from pipo.base.config import EngineConfig
from pipo.base.errors import MalformedTable, OverBudget, UsageError
from pipo.base.units import MIB, format_size, round_up
from pipo.hardware.budget import ram_bytes
from pipo.hardware.memory import tree_anonymous_bytes
from pipo.jobs.answers import Answer, AnswerNames
from pipo.jobs.children import run_in_child
from pipo.jobs.engine_plan import EngineSpec, best_num_sequences, model_facts
from pipo.jobs.job import Job, Tally
from pipo.jobs.journal import JobIdentity, Journal, Write
from pipo.jobs.output import check_output, publish
from pipo.jobs.prompts import PromptSettings, PromptSource
from pipo.jobs.reader import Reader, Reading, Survey, bits_of, has_bit, set_bit, survey
from pipo.jobs.table import Create, OutputForm, create_file
from pipo.jobs.tables import open_table
from pipo.planner.placement import smallest_ram_text
from pipo.planner.predict import Workload
from pipo.serving.contract import EngineClient, EngineStats

BESIDES_BYTES = 80 * MIB  # of this process and the reader with a small vocabulary; more where they measure more
GROWTH_BYTES = 16 * MIB  # beyond what they have once the first window is ready: longer rows, windows that wait
MAX_SEQUENCES = 4096
SEQUENCES_ELSEWHERE = 32  # for the size of a window, where nobody has counted them yet
OPEN_PER_SEQUENCE = 4  # requests with the engine: it never waits for this process to offer the next
WINDOW_PER_SEQUENCE = 16  # rows that are ordered together
LEAST_WINDOW, MOST_WINDOW = 64, 2048
TICK_S = 1.0

StartEngine = Callable[[EngineSpec], Awaitable[EngineClient]]
OnTick = Callable[[Tally, EngineStats, int], None]  # with the anonymous bytes of all processes


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What a job is. `num_sequences` None: the planner's choice; `num_rows` None: all of them."""

    model: Path
    table: Path
    output: Path
    config: EngineConfig
    prompts: PromptSettings
    num_sequences: int | None = None
    num_rows: int | None = None
    names: AnswerNames = field(default_factory=AnswerNames)
    is_resumed: bool = False
    is_overwritten: bool = False


class Batch:
    """A job with its journal open. A context manager. Raises PipoError before anything is computed, where it can.

    `chosen` is what the job's first start found out, and `tally` how far it has come.
    """

    def __init__(self, settings: BatchSettings, *, create: Create = create_file, write: Write = os.write) -> None:
        """`create` makes files of the output, `write` appends to the journal: a disk, or one that is full in tests."""
        check_output(
            settings.table, settings.output, is_resumed=settings.is_resumed, is_overwritten=settings.is_overwritten
        )
        self.settings = settings
        self.limit_bytes = ram_bytes(settings.config.ram)
        self._create = create
        self._write = write
        self._table = open_table(settings.table)
        self._version = self._table.version()
        self._contents = self._table.look()
        self._check_columns()
        self._facts = model_facts(settings.model)
        self.num_rows = min(settings.num_rows or self._contents.num_rows, self._contents.num_rows)
        self.tally = Tally(self.num_rows)
        self.done = bits_of(self.num_rows)
        self.chosen: Mapping[str, int] = {}
        self.journal = self._opened_journal()
        try:
            self.chosen = self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def is_complete(self) -> bool:
        """Every row has its answer in the journal."""
        return self.tally.num_done >= self.num_rows

    async def run(
        self,
        start: StartEngine,
        on_start: Callable[[EngineClient], None],
        on_tick: OnTick,
        *,
        is_elsewhere: bool = False,
    ) -> None:
        """Answer what is left. Whatever ends it early, `--resume` goes on from there.

        Engines that are elsewhere plan for themselves, with all of the budget: here is none.
        """
        num_sequences = await asyncio.to_thread(self._num_sequences, is_elsewhere=is_elsewhere)
        reader = await asyncio.to_thread(Reader, self._reading(num_sequences), bytes(self.done))
        try:
            client = await self._started(start, num_sequences)
            try:
                on_start(client)
                await self._answer(client, reader, OPEN_PER_SEQUENCE * client.info.num_sequences, on_tick)
            finally:
                await client.close()
        finally:
            reader.close()

    def publish(self) -> None:
        """The output gets its name, and the journal goes."""
        form = OutputForm(self.settings.names, self._facts.name, self._create)
        publish(self._table, self._version, self._contents, self.journal, self.num_rows, self.settings.output, form)
        self.journal.remove()

    def close(self) -> None:
        if not self.journal.has_answers():
            self.journal.remove()
        self.journal.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_columns(self) -> None:
        """Raises UsageError for settings that this table cannot be read with."""
        PromptSource(self.settings.prompts, self._contents)
        taken = self._table.taken_names(self._contents, self.settings.names)
        if taken:
            raise UsageError(
                f"{self.settings.table} has columns of its own called {', '.join(taken)}",
                hint="--column-prefix pipo_ calls the new ones pipo_answer, pipo_error, …",
            )

    def _opened_journal(self) -> Journal:
        settings = self.settings
        path = settings.output.with_name(f"{settings.output.name}.journal")
        if settings.is_resumed and settings.output.exists() and not path.exists():
            raise UsageError(
                f"-o {settings.output} is already there and complete: it has no journal", hint="--overwrite"
            )
        journal = Journal(path, write=self._write)
        try:
            if not settings.is_overwritten:
                journal.identity()
        except BaseException:
            journal.close()
            raise
        if journal.has_answers() and not (settings.is_resumed or settings.is_overwritten):
            journal.close()
            raise UsageError(
                f"{path} is there: a job for this output was not finished",
                hint="--resume goes on with it, --overwrite begins anew",
            )
        return journal

    def _begin(self) -> Mapping[str, int]:
        """What was chosen: now, or when the job that is resumed began."""
        known = self.journal.identity() if self.settings.is_resumed else None
        if known is None:
            identity = self._identity(self._choose())
            self.journal.begin(identity)
            return identity.chosen
        known.check_same(self._identity({}), self.journal.path)
        self.journal.repair(self._note_old)
        return known.chosen

    def _note_old(self, answer: Answer) -> None:
        if answer.row < self.num_rows and not has_bit(self.done, answer.row):
            self.tally.note(answer)
            set_bit(self.done, answer.row)

    def _identity(self, chosen: Mapping[str, int]) -> JobIdentity:
        config, prompts = self.settings.config, self.settings.prompts
        names = ("context_tokens", "cache_type_k", "cache_type_v", "layout", "prefill_chunk")
        constraint = prompts.constraint and [prompts.constraint.kind.value, prompts.constraint.text]
        settings = {
            **{name: getattr(config, name) for name in names},
            **{name: getattr(prompts, name) for name in ("template", "column", "system", "is_raw")},
            "params": {**asdict(prompts.params), "logit_bias": str(dict(prompts.params.logit_bias))},
            "constraint": constraint,
            "lora": [[str(choice.path), choice.scale] for choice in config.lora],
            "columns": list(self.settings.names.all),
            "num_rows": self.num_rows,
        }
        return JobIdentity(self._facts.identity, self._contents.identity, settings, chosen)

    def _choose(self) -> dict[str, int]:
        """The context that every row fits that can, and what there is to do. Nothing is looked through with -c."""
        wanted, reading = self.settings.config.context_tokens, self._reading(1)
        found = Survey(0, 0, 0, 0) if wanted else run_in_child(survey, reading)
        context = wanted or max(found.longest_tokens, 1)
        return {"context_tokens": context, **{name: getattr(found, name) for name in Survey.__slots__}}

    def _reading(self, num_sequences: int) -> Reading:
        window = min(max(WINDOW_PER_SEQUENCE * num_sequences, LEAST_WINDOW), MOST_WINDOW)
        settings, context = self.settings, self.chosen.get("context_tokens", self.settings.config.context_tokens)
        return Reading(
            model=settings.model,
            table=settings.table,
            version=self._version,
            contents=self._contents,
            settings=settings.prompts,
            context_tokens=context,
            num_rows=self.num_rows,
            window_rows=window,
        )

    @property
    def context_tokens(self) -> int:
        return self.chosen["context_tokens"]

    @property
    def workload(self) -> Workload:
        """A row of middling length; without a survey, half of the context each."""
        num = self.chosen["num_askable"]
        if not num:
            answer = min(self.settings.prompts.params.max_tokens or self.context_tokens // 2, self.context_tokens - 1)
            return Workload(max(self.context_tokens - answer, 1), max(answer, 1))
        prompt, answer = self.chosen["prompt_tokens"], self.chosen["answer_tokens"]
        return Workload(max(prompt // num, 1), max(answer // num, 1))

    def _num_sequences(self, *, is_elsewhere: bool) -> int:
        left = self.num_rows - self.tally.num_done
        if is_elsewhere:
            return self.settings.num_sequences or SEQUENCES_ELSEWHERE
        if self.settings.num_sequences is not None:
            return min(self.settings.num_sequences, left)
        spec = self._spec(1, BESIDES_BYTES)
        with _naming_all(BESIDES_BYTES):
            return best_num_sequences(spec, min(left, MAX_SEQUENCES))

    def _spec(self, num_sequences: int, besides_bytes: int) -> EngineSpec:
        ram = max(self.limit_bytes - besides_bytes, 1)
        may_constrain = self.settings.prompts.constraint is not None or self._contents.is_openai
        config = replace(self.settings.config, ram=str(ram), num_sequences=num_sequences, constraints=may_constrain)
        workload = replace(self.workload, num_sequences=num_sequences)
        return EngineSpec(self.settings.model, config, self.context_tokens, workload)

    async def _started(self, start: StartEngine, num_sequences: int) -> EngineClient:
        besides_bytes = max(round_up(tree_anonymous_bytes() + GROWTH_BYTES, 4 * MIB), BESIDES_BYTES)
        with _naming_all(besides_bytes):
            return await start(self._spec(num_sequences, besides_bytes))

    async def _answer(self, client: EngineClient, reader: Reader, max_open: int, on_tick: OnTick) -> None:
        """Whichever fails ends the other: answers, and whoever is told of them."""
        answering = asyncio.create_task(Job(client, self.journal, self.tally, max_open).run(reader.windows()))
        ticking = asyncio.create_task(self._tick(client, on_tick))
        try:
            await asyncio.wait((answering, ticking), return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            ticking.cancel()
            ends = await asyncio.gather(answering, ticking, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end
        if not self.is_complete:
            raise MalformedTable(f"{self.settings.table}: has fewer rows than when the job began")
        on_tick(self.tally, await client.stats(), tree_anonymous_bytes())

    async def _tick(self, client: EngineClient, on_tick: OnTick) -> None:
        while True:
            on_tick(self.tally, await client.stats(), tree_anonymous_bytes())
            await asyncio.sleep(TICK_S)


@contextmanager
def _naming_all(besides_bytes: int) -> Iterator[None]:
    """An engine knows its own share of the budget; a person names the whole."""
    try:
        yield
    except OverBudget as error:
        least = None if error.smallest_bytes is None else error.smallest_bytes + besides_bytes
        raise OverBudget(
            f"{error.message}\n  of --ram, {format_size(besides_bytes)} are for reading ahead and for the job itself",
            smallest_bytes=least,
            hint=error.hint if least is None else f"the smallest --ram that works is {smallest_ram_text(least)}",
        ) from error
