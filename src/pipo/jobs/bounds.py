"""What the work for one row may take: a template may say a loop in a loop, or a text of a gigabyte."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipo.base.cgroups import PROC
from pipo.base.units import MIB

MAX_ROW_S = 2.0  # of the processor, not of the clock; a text of 16 Mi characters takes 0.3
MAX_ROW_BYTES = 256 * MIB  # such a text has 64 MiB where a character is beyond U+FFFF, and is joined from its pieces
_AGAIN_S = 0.5  # where something in between has swallowed the error


@contextmanager
def row_bounds(seconds: float = MAX_ROW_S, num_bytes: int = MAX_ROW_BYTES) -> Iterator[None]:
    """Raises TimeoutError, MemoryError. Cost: 30 µs. Memory is bounded where there is /proc.

    Threads: the main one of a process in which no other one takes memory meanwhile.
    """
    with _memory_bound(num_bytes), _time_bound(seconds):
        yield


@contextmanager
def _time_bound(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


@contextmanager
def _memory_bound(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(OSError):
        pages = int((PROC / "self" / "statm").read_text().split()[5])
        wanted = pages * resource.getpagesize() + num_bytes
        if limits[0] == resource.RLIM_INFINITY or wanted < limits[0]:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
