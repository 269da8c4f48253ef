"""A drive that goes silent."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence


class Gate:
    """A preadv that gets stuck once `num_left` more reads have begun, until it is opened."""

    def __init__(self) -> None:
        self.num_left: int | None = None
        self.num_stuck = 0
        self._opened = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            is_stuck = self.num_left == 0
            self.num_stuck += is_stuck
            if self.num_left:
                self.num_left -= 1
        if is_stuck:
            self._opened.wait()
        return os.preadv(fd, buffers, offset)

    def open(self) -> None:
        self._opened.set()
