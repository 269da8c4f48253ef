"""Stream one answer: a sign of life while the prompt is read, then text as it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from pipo.cli.flags import OutputFlags
from pipo.cli.terminal import stderr
from pipo.engine import Engine
from pipo.generation.request import FinishReason, Sampled, SamplingParams

_FIRST_LINE_S, _NEXT_LINE_S = 2.0, 10.0  # between lines of progress where there is no terminal


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    tokens: tuple[Sampled, ...]
    finish: FinishReason


class Prefill(Protocol):
    """Shows how much of the prompt was computed. `advance` is called on the compute thread."""

    def start(self) -> None: ...

    def advance(self, done: int, total: int) -> None: ...

    def stop(self) -> None:
        """The first token is there. Stopping again does nothing."""


class SilentPrefill:
    def start(self) -> None: ...

    def advance(self, done: int, total: int) -> None: ...

    def stop(self) -> None: ...


class PrefillBar:
    """A bar on a terminal, gone when the answer begins."""

    def __init__(self, console: Console, num_tokens: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        counts = BarColumn(), MofNCompleteColumn(), TextColumn("tokens")
        times = TimeElapsedColumn(), TextColumn("·"), TimeRemainingColumn(), TextColumn("left")
        self._progress = Progress(
            TextColumn("prefill"), *counts, *times, console=console, transient=True, refresh_per_second=5
        )
        self._task = self._progress.add_task("prefill", total=num_tokens)

    def start(self) -> None:
        self._progress.start()

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()


class PrefillLines:
    """A line now and then, for a log: nothing for a prompt that takes under two seconds."""

    def __init__(self, console: Console, num_tokens: int) -> None:
        self._console = console
        self._done, self._total = 0, num_tokens
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def advance(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def stop(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        begin = time.monotonic()
        wait_s = _FIRST_LINE_S
        while not self._is_over.wait(wait_s):
            self._console.print(f"prefill {self._done}/{self._total} tokens, {time.monotonic() - begin:.0f} s")
            wait_s = _NEXT_LINE_S


def prefill_display(num_tokens: int, output: OutputFlags) -> Prefill:
    if output.quiet:
        return SilentPrefill()
    return PrefillBar(stderr(), num_tokens) if stderr().is_terminal else PrefillLines(stderr(), num_tokens)


def stream_answer(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    output: OutputFlags,
    on_text: Callable[[str], None],
) -> Answer:
    """`on_text` gets the pieces as they come. Whatever is raised meanwhile stops the computation first."""
    texts: list[str] = []
    tokens: list[Sampled] = []
    finish = FinishReason.CANCELLED
    prefill = prefill_display(len(prompt), output)
    try:
        prefill.start()
        with closing(engine.stream(prompt, params, prefill.advance)) as pieces:
            for piece in pieces:
                prefill.stop()
                if piece.text:
                    texts.append(piece.text)
                    on_text(piece.text)
                if piece.token is not None:
                    tokens.append(piece.token)
                finish = piece.finish or finish
    finally:
        prefill.stop()
    return Answer("".join(texts), tuple(tokens), finish)
