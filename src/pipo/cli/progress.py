"""How far long work has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from rich.console import Console

from pipo.cli.flags import OutputFlags
from pipo.cli.terminal import stderr

_FIRST_LINE_S, _NEXT_LINE_S = 2.0, 10.0  # between lines of progress where there is no terminal


class ProgressDisplay(Protocol):
    """Shows how many tokens were computed. Threads: `advance` from any."""

    def start(self) -> None: ...

    def advance(self, done: int, total: int, note: str = "") -> None:
        """`note` is what is known so far."""

    def stop(self) -> None:
        """The work is over. Stopping again does nothing."""


class SilentProgress:
    def start(self) -> None: ...

    def advance(self, done: int, total: int, note: str = "") -> None: ...

    def stop(self) -> None: ...


class ProgressBar:
    """A bar on a terminal, gone when the work is over."""

    def __init__(self, console: Console, what: str, num_tokens: int, unit: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        counts = BarColumn(), MofNCompleteColumn(), TextColumn(unit)
        times = TimeElapsedColumn(), TextColumn("·"), TimeRemainingColumn(), TextColumn("left{task.fields[note]}")
        self._progress = Progress(
            TextColumn(what), *counts, *times, console=console, transient=True, refresh_per_second=5
        )
        self._task = self._progress.add_task(what, total=num_tokens, note="")

    def start(self) -> None:
        self._progress.start()

    def advance(self, done: int, total: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, note=f" · {note}" if note else "")

    def stop(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()


class ProgressLines:
    """A line now and then, for a log: nothing for what takes under two seconds."""

    def __init__(self, console: Console, what: str, num_tokens: int, unit: str) -> None:
        self._console = console
        self._what = what
        self._unit = unit
        self._done, self._total, self._note = 0, num_tokens, ""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def advance(self, done: int, total: int, note: str = "") -> None:
        self._done, self._total, self._note = done, total, note

    def stop(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        begin = time.monotonic()
        wait_s = _FIRST_LINE_S
        while not self._is_over.wait(wait_s):
            self._console.print(self._line(time.monotonic() - begin))
            wait_s = _NEXT_LINE_S

    def _line(self, seconds: float) -> str:
        line = f"{self._what} {self._done}/{self._total} {self._unit}, {seconds:.0f} s"
        left = f", {seconds / self._done * (self._total - self._done):.0f} s left" if self._done else ""
        return line + left + (f" · {self._note}" if self._note else "")


def progress_display(what: str, num_tokens: int, output: OutputFlags, unit: str = "tokens") -> ProgressDisplay:
    """`num_tokens` is how many of the `unit` there are to do."""
    if output.quiet:
        return SilentProgress()
    kind = ProgressBar if stderr().is_terminal else ProgressLines
    return kind(stderr(), what, num_tokens, unit)
