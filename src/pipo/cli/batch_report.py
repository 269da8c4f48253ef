"""What a batch job says: its plan, how far it has come, and what it cost; for a person or as JSON lines."""

from __future__ import annotations

import json as json_module
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from pipo.base.units import format_rate, format_size
from pipo.cli.flags import OutputFlags
from pipo.cli.progress import ProgressDisplay, progress_display
from pipo.cli.terminal import Row, print_note, print_rows, print_warning, printable, stderr
from pipo.jobs.batch import Batch
from pipo.jobs.job import Tally
from pipo.serving.contract import EngineClient, EngineStats


@contextmanager
def looking_at(table: Path, output: OutputFlags) -> Iterator[None]:
    """Show that something goes on: a large table is read and tokenised once before anything is planned."""
    if output.quiet or not stderr().is_terminal:
        yield
        return
    with stderr().status(printable(f"looking through {table} …"), spinner_style="dim"):
        yield


class BatchReport:
    """A context manager: whatever ends the job early, it says how to go on."""

    def __init__(self, job: Batch, output: OutputFlags, *, json: bool, is_elsewhere: bool = False) -> None:
        """`is_elsewhere`: engines on other machines, whose memory is not this one's."""
        self._is_elsewhere = is_elsewhere
        self._limit_bytes = job.limit_bytes
        self._job = job
        self._output = output
        self._json = json
        self._begin_s = time.monotonic()
        self._done_before = job.tally.num_done
        self._peak_bytes = 0
        self._stats = EngineStats()
        self._display: ProgressDisplay | None = None

    def start(self, client: EngineClient) -> None:
        """The engine runs."""
        self._begin_s = time.monotonic()
        if self._is_elsewhere:
            self._limit_bytes = client.info.limit_bytes
        self._event("start", **self._job_values(), engine=asdict(client.info))
        if not self._output.quiet:
            print_rows(stderr(), f"{client.info.model} · {self._job.num_rows} rows", self._rows(client), style="dim")
        self._display = progress_display("answering", self._job.num_rows, self._output, "rows")
        self._display.start()

    def tick(self, tally: Tally, stats: EngineStats, anonymous_bytes: int) -> None:
        self._stats = stats
        self._peak_bytes = max(self._peak_bytes, stats.anonymous_bytes if self._is_elsewhere else anonymous_bytes)
        self._event("progress", **asdict(tally), **self._rates())
        if self._display is not None:
            self._display.advance(tally.num_done, tally.num_rows, self._note(tally))

    def end(self) -> None:
        """The output is there."""
        self._stop()
        tally = self._job.tally
        self._event("end", **self._job_values(), **asdict(tally), **self._rates(), seconds=self._seconds)
        if self._peak_bytes > self._limit_bytes:
            peak, limit = format_size(self._peak_bytes), format_size(self._limit_bytes)
            print_warning(f"the processes had {peak} of anonymous memory, more than the limit of {limit}")
        if not self._output.quiet:
            print_note(" · ".join(self._summary()))

    def __enter__(self) -> BatchReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if error is not None and self._job.tally.num_done:
            self._say_how_to_go_on()

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._begin_s

    def _rows(self, client: EngineClient) -> Iterator[Row]:
        info, job = client.info, self._job
        if self._done_before:
            yield "resumed", f"{self._done_before} rows are answered already"
        yield "sequences", f"{info.num_sequences} at a time, {info.context_tokens} tokens of context each"
        engine, limit = format_size(info.limit_bytes), format_size(job.limit_bytes)
        if self._is_elsewhere:
            yield "memory", f"{engine} for the engines of all nodes"
            return
        besides = job.limit_bytes - info.limit_bytes
        yield "memory", f"{engine} for the engine, {format_size(besides)} for reading and the job, the limit is {limit}"

    def _note(self, tally: Tally) -> str:
        failed = [f"{tally.num_failed} with an error"] if tally.num_failed else []
        return " · ".join([*failed, f"{tally.completion_tokens / max(self._seconds, 1e-9):.1f} tok/s", *self._sweeps()])

    def _sweeps(self) -> list[str]:
        stats = self._stats
        if not stats.wall_s:
            return []
        return [f"{stats.num_passes / stats.wall_s:.1f} sweeps/s", format_rate(stats.bytes_read / stats.wall_s)]

    def _summary(self) -> Iterator[str]:
        tally = self._job.tally
        yield f"{tally.num_rows} rows in {self._job.settings.output}"
        if tally.num_copied:
            yield f"{tally.num_copied} had another row's prompt"
        yield f"{tally.prompt_tokens} tokens read, {tally.completion_tokens} written"
        yield self._note(tally)
        if self._peak_bytes:
            yield f"peak {format_size(self._peak_bytes)} of {format_size(self._limit_bytes)}"

    def _rates(self) -> dict[str, object]:
        tally, stats, seconds = self._job.tally, self._stats, max(self._seconds, 1e-9)
        num_new = tally.num_done - self._done_before
        left = tally.num_rows - tally.num_done
        return {
            "tokens_per_s": tally.completion_tokens / seconds,
            "sweeps_per_s": stats.num_passes / stats.wall_s if stats.wall_s else 0.0,
            "bytes_per_s": stats.bytes_read / stats.wall_s if stats.wall_s else 0.0,
            "peak_bytes": self._peak_bytes,
            "left_s": left * seconds / num_new if num_new else None,
        }

    def _job_values(self) -> dict[str, object]:
        settings = self._job.settings
        paths = {"model": settings.model, "input": settings.table, "output": settings.output}
        return {name: str(path) for name, path in paths.items()} | {"limit_bytes": self._job.limit_bytes}

    def _event(self, name: str, **values: object) -> None:
        if self._json:
            sys.stdout.write(json_module.dumps({"event": name, **values}) + "\n")
            sys.stdout.flush()

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _say_how_to_go_on(self) -> None:
        tally = self._job.tally
        self._event("stopped", **self._job_values(), **asdict(tally))
        again = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        print_note(f"{tally.num_done} of {tally.num_rows} rows are answered and kept; to go on:")
        print_note(f"  {shlex.join(['pipo', *again, '--resume'])}")
