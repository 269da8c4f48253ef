"""The kernel's page cache, which weights must not fill."""

from __future__ import annotations

import os


def forget_cached(fd: int, offset: int, num_bytes: int) -> None:
    """Drop a run of a file from the page cache, where the system has a call for it.

    Ask for no more than was read: another process may be using the rest.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)
