"""SIGTERM as an exception, so that it leaves a run the way Ctrl-C does: computation stopped, memory given back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """Somebody asked this process to end."""


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Raise Terminated in the main thread while the block runs."""
    previous = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated
