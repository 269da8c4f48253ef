"""Reading, rendering and tokenising, ahead of the answers and in another process: the weights never wait for a row.

The reader prepares a window of rows, orders it, and sends it when it is asked for: at most AHEAD windows lie ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from pipo.jobs.answers import Answer
from pipo.jobs.children import receive, start_child, stop_child
from pipo.jobs.grouping import grouped
from pipo.jobs.preparation import Prepared, Preparer
from pipo.jobs.prompts import PromptSettings, PromptSource
from pipo.jobs.table import Contents, changed
from pipo.jobs.tables import open_table
from pipo.model_file import ModelFile

AHEAD = 2  # windows

Window = list[Prepared | Answer]  # an answer is of a row that cannot be asked


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read and how. `version` is the table's when the job began, `window_rows` what is ordered together."""

    model: Path
    table: Path
    version: object
    contents: Contents
    settings: PromptSettings
    context_tokens: int | None
    num_rows: int  # the first ones; the others are left out
    window_rows: int


@dataclass(frozen=True, slots=True)
class Survey:
    """Of all rows that can be asked: what they need of a context, and how much there is to do."""

    num_askable: int
    longest_tokens: int  # prompt and answer together
    prompt_tokens: int
    answer_tokens: int  # at most


def survey(reading: Reading) -> Survey:
    """Cost: tokenising the table once, some 100,000 tokens a second. Raises PipoError."""
    num_askable = longest = prompt_tokens = answer_tokens = 0
    for prepared in _prepared(reading, done=b""):
        if isinstance(prepared, Prepared):
            num_prompt, num_answer = len(prepared.request.prompt), prepared.request.params.max_tokens or 0
            num_askable += 1
            longest = max(longest, num_prompt + num_answer)
            prompt_tokens += num_prompt
            answer_tokens += num_answer
    return Survey(num_askable, longest, prompt_tokens, answer_tokens)


class Reader:
    """The process that reads ahead; its first window is ready when it is made.

    Raises PipoError where it fails: a table that is gone or has changed ends the job.
    """

    def __init__(self, reading: Reading, done: bytes) -> None:
        """`done` has a bit for each row that is answered already, the lowest first."""
        self._connection, self._process = start_child(_read, reading, done)
        try:
            receive(self._connection)
        except BaseException:
            self.close()
            raise

    async def windows(self) -> AsyncIterator[Window]:
        """In the table's order; inside, as `grouped` has it. Ends after the last."""
        for _ in range(AHEAD):
            self._connection.send(None)
        while True:
            found = await asyncio.to_thread(receive, self._connection)
            if not isinstance(found, list):
                return
            self._connection.send(None)
            yield found

    def close(self) -> None:
        stop_child(self._connection, self._process)


def bits_of(num_rows: int) -> bytearray:
    """None of them set."""
    return bytearray((num_rows + 7) // 8)


def set_bit(bits: bytearray, row: int) -> None:
    bits[row >> 3] |= 1 << (row & 7)


def has_bit(bits: bytes | bytearray, row: int) -> bool:
    return row >> 3 < len(bits) and bool(bits[row >> 3] & 1 << (row & 7))


def _read(connection: Connection, reading: Reading, done: bytes) -> None:
    """What the process does: a window is made before it is asked for."""
    windows = _windows(reading, done)
    window = next(windows, None)
    connection.send(None)
    while True:
        connection.recv()
        connection.send(window)
        if window is None:
            connection.recv()  # until the other side has read it and closes
        window = next(windows, None)


def _windows(reading: Reading, done: bytes) -> Iterator[Window]:
    """Of rows that are not done."""
    window: list[Prepared] = []
    failed: list[Answer] = []
    for each in _prepared(reading, done):
        if isinstance(each, Prepared):
            window.append(each)
        else:
            failed.append(each)
        if len(window) + len(failed) >= reading.window_rows:
            yield [*failed, *grouped(window)]
            window, failed = [], []
    if window or failed:
        yield [*failed, *grouped(window)]


def _prepared(reading: Reading, done: bytes) -> Iterator[Prepared | Answer]:
    model = ModelFile(reading.model)
    source = PromptSource(reading.settings, reading.contents)
    preparer = Preparer(model, source, reading.context_tokens)
    table = open_table(reading.table)
    if table.version() != reading.version:
        raise changed(reading.table)
    num_read = 0
    for num_read, row in enumerate(table.rows(source.columns), 1):
        if not has_bit(done, num_read - 1):
            yield preparer.prepare(num_read - 1, row)
        if num_read == reading.num_rows:
            break
    if num_read < reading.num_rows:
        raise changed(reading.table)
