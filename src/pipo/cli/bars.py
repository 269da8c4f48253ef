"""A bar for work on many bytes, shown once it has taken two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipo.cli.flags import OutputFlags

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOWN_AFTER_S = 2.0


@contextmanager
def byte_bar(what: str, output: OutputFlags) -> Iterator[Callable[[int, int], None]]:
    """Yields what is told the bytes done and all of them. Nothing is shown with --quiet, or where nobody looks."""
    from pipo.cli.terminal import stderr

    if output.quiet or not stderr().is_terminal:
        yield lambda done, total: None
        return
    bar = _LateBar(what)
    try:
        yield bar.advance
    finally:
        bar.close()


def byte_progress(description: str, *, is_transient: bool) -> Progress:
    """Bars with bytes, rate and the time that is left, behind a text in rich's words."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from pipo.cli.terminal import stderr

    counts = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(TextColumn(description), *counts, console=stderr(), transient=is_transient)


class _LateBar:
    def __init__(self, what: str) -> None:
        self._what, self._begin_s = what, time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, done: int, total: int) -> None:
        if self._bar is None and time.monotonic() - self._begin_s >= SHOWN_AFTER_S:
            self._show(done, total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, done: int, total: int) -> None:
        self._bar = byte_progress("{task.description}", is_transient=True)
        self._task = self._bar.add_task(self._what, total=total, completed=done)
        self._bar.start()
