"""The job itself: windows of rows into an engine, answers into the journal.

Threads: an event loop's. As many requests are open as the engine may want to choose from; it shares its sweeps of the
weights among them. Answers are kept in groups, each synced while the next one gathers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace

from pipo.base.errors import ContextOverflow, EngineBusy, OverBudget, UsageError
from pipo.generation.request import FinishReason
from pipo.jobs.answers import Answer
from pipo.jobs.journal import Journal
from pipo.jobs.preparation import Prepared
from pipo.jobs.reader import Window
from pipo.serving.contract import EngineClient, Summary

SYNC_EVERY_S = 0.25  # a sync costs the drive that weights stream from some ms
BUSY_WAIT_S = 0.05
MOST_WAITING = 1024  # rows for one answer, so that a table of equal rows is not in memory before its first answer is
KNOWN_PROMPTS = 1 << 15  # whose answers can be found again; 200 bytes each


@dataclass(slots=True)
class Tally:
    """How far it has come. `num_done` rows are in the journal; tokens are of this run, as they are made."""

    num_rows: int
    num_done: int = 0
    num_failed: int = 0
    num_copied: int = 0  # answered by another row's answer
    prompt_tokens: int = 0  # of answers that are complete
    completion_tokens: int = 0
    first_error: str | None = None  # of those in the journal

    def note(self, answer: Answer) -> None:
        self.num_done += 1
        self.num_failed += answer.error is not None
        self.first_error = self.first_error or answer.error


class Job:
    """One run over the rows that are left. `max_open` requests are with the engine at a time."""

    def __init__(self, client: EngineClient, journal: Journal, tally: Tally, max_open: int) -> None:
        self._client = client
        self._journal = journal
        self._tally = tally
        self._open = asyncio.Semaphore(max_open)
        self._asking: dict[bytes, list[int]] = {}  # rows that wait for an answer to the same
        self._known: OrderedDict[bytes, Answer | int] = OrderedDict()  # the answer, or where it is in the journal
        self._finished: list[tuple[bytes | None, Answer]] = []  # not kept yet
        self._keeping: asyncio.Task[None] | None = None  # the group that is being written
        self._has_finished = asyncio.Event()
        self._is_over = False

    async def run(self, windows: AsyncIterator[Window]) -> None:
        """Until every row has its answer in the journal. Whatever ends it, what was answered is kept.

        Raises the first error that is no row's own: TransferError, ComputeError, OutputFailed, MalformedTable, …
        """
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep())
                asking: set[asyncio.Task[None]] = set()
                async for window in windows:
                    for each in window:
                        await self._take(each, group, asking)
                while asking:
                    await asyncio.wait(asking)
                self._is_over = True
                self._has_finished.set()
                await keeper
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        finally:
            if self._keeping is not None:  # a cancelled job does not stop a thread that writes
                await asyncio.wait([self._keeping])
            await self._store(self._taken())

    async def _take(self, each: Prepared | Answer, group: asyncio.TaskGroup, asking: set[asyncio.Task[None]]) -> None:
        if isinstance(each, Answer):
            self._finish(None, each)
        elif each.key is not None and each.key in self._asking:
            self._asking[each.key].append(each.row)
            while len(self._asking.get(each.key, ())) >= MOST_WAITING:
                await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        elif (known := self._find(each.key)) is not None:
            self._tally.num_copied += 1
            self._finish(None, _of_row(known, each.row))
        else:
            if each.key is not None:
                self._asking[each.key] = []
            await self._open.acquire()
            task = group.create_task(self._answer(each))
            asking.add(task)
            task.add_done_callback(asking.discard)

    async def _answer(self, prepared: Prepared) -> None:
        try:
            answer = await self._ask(prepared)
        except (UsageError, ContextOverflow, OverBudget) as error:  # of this request: nothing was computed
            answer = Answer.failed(prepared.row, error, len(prepared.request.prompt))
        finally:
            self._open.release()
        self._finish(prepared.key, answer)

    async def _ask(self, prepared: Prepared) -> Answer:
        while True:
            with suppress(EngineBusy):
                return await self._stream(prepared)
            await asyncio.sleep(BUSY_WAIT_S)

    async def _stream(self, prepared: Prepared) -> Answer:
        texts: list[str] = []
        finish, summary = FinishReason.CANCELLED, None
        async for piece in self._client.stream(prepared.request):
            if isinstance(piece, Summary):
                summary = piece
                continue
            texts.append(piece.text)
            finish = piece.finish or finish
            self._tally.completion_tokens += piece.token is not None
        assert summary is not None, "a stream ends with its summary"
        self._tally.prompt_tokens += summary.usage.prompt_tokens
        usage = summary.usage
        return Answer(prepared.row, "".join(texts), finish.value, usage.prompt_tokens, usage.completion_tokens)

    def _finish(self, key: bytes | None, answer: Answer) -> None:
        """It, and the rows that wait for the same."""
        self._finished.append((key, answer))
        for row in self._asking.pop(key, []) if key is not None else []:
            self._tally.num_copied += 1
            self._finished.append((None, _of_row(answer, row)))
        if key is not None:
            self._known[key] = answer
        self._has_finished.set()

    def _find(self, key: bytes | None) -> Answer | None:
        known = self._known.get(key) if key is not None else None
        return self._journal.read(known) if isinstance(known, int) else known

    async def _keep(self) -> None:
        """Groups of answers into the journal, one group after another."""
        while not (self._is_over and not self._finished):
            await self._has_finished.wait()
            self._has_finished.clear()
            if group := self._taken():
                self._keeping = asyncio.create_task(self._store(group))
                await asyncio.shield(self._keeping)
            if not self._is_over:
                await asyncio.sleep(SYNC_EVERY_S)
            if self._finished or self._is_over:
                self._has_finished.set()

    async def _store(self, group: list[tuple[bytes | None, Answer]]) -> None:
        if group:
            offsets = await asyncio.to_thread(self._append, [answer for _, answer in group])
            self._note(group, offsets)

    def _append(self, answers: list[Answer]) -> list[int]:
        """On a thread, which ends its work even where everything that waits for it is cancelled."""
        offsets = self._journal.append(answers)
        for answer in answers:
            self._tally.note(answer)
        return offsets

    def _taken(self) -> list[tuple[bytes | None, Answer]]:
        group, self._finished = self._finished, []
        return group

    def _note(self, group: list[tuple[bytes | None, Answer]], offsets: list[int]) -> None:
        for (key, _), offset in zip(group, offsets, strict=True):
            if key is not None:
                self._known[key] = offset
        while len(self._known) > KNOWN_PROMPTS:
            self._known.popitem(last=False)


def _of_row(answer: Answer, row: int) -> Answer:
    return replace(answer, row=row)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first, without the groups around it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
