"""One engine in a process of its own, which stays alive and does one measured piece of work when asked."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from types import TracebackType
from typing import TypeVar, cast

from bench.cgroup import Cgroup
from bench.messages import Failure, Request

R = TypeVar("R")
_ROOT = Path(__file__).resolve().parents[1]
_END_S = 10.0
_LOG_TAIL_BYTES = 600


class ChildFailed(Exception):
    """The child answered that it could not, or is gone."""


class Child:
    """Runs `bench.serve KIND`, under another `python` if told so. Close it, or use it as a context manager.

    Threads: one.
    """

    def __init__(
        self, kind: str, *, group: Cgroup | None = None, environment: Mapping[str, str], python: str = sys.executable
    ) -> None:
        self.kind = kind
        self._group = group
        self._too_slow_s = 0.0
        self._log = TemporaryFile()  # noqa: SIM115 - closed with the child
        command = [python, "-m", "bench.serve", kind]
        self._process = subprocess.Popen(
            group.wrap(command) if group else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_ROOT,
            env={**os.environ, **environment},
        )
        self.pid = self._process.pid

    def ask(self, request: Request[R], limit_s: float | None = None) -> R:
        """A child that takes longer than the limit is ended. Raises ChildFailed."""
        with self._ended_after(limit_s):
            return self._ask(request)

    @contextmanager
    def _ended_after(self, limit_s: float | None) -> Iterator[None]:
        if limit_s is None:
            yield
            return
        timer = Timer(limit_s, self._end_slow, [limit_s])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_slow(self, limit_s: float) -> None:
        self._too_slow_s = limit_s
        self._process.kill()

    def _ask(self, request: Request[R]) -> R:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise ChildFailed(self._obituary()) from error
        if isinstance(answer, Failure):
            raise ChildFailed(f"{self.kind}: {answer.message}")
        return cast(R, answer)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def bytes_read(self) -> int:
        """From the drive, since it started, through page faults too; 0 where the system does not tell."""
        try:
            lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what a dead child was asked last is still in the buffer
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _obituary(self) -> str:
        status = self._process.wait(_END_S)
        if self._too_slow_s:
            return f"{self.kind}: no answer within {self._too_slow_s:.0f} s"
        if self._group is not None and self._group.num_kills:
            return f"{self.kind}: killed for want of memory"
        self._log.seek(max(self._log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES, 0))
        return f"{self.kind}: ended with status {status}\n{self._log.read().decode(errors='replace')}"
