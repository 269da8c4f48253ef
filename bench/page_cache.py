"""How much of a file the page cache holds."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def cached_bytes(path: Path) -> int:
    """Bytes of the file in the page cache, whoever is charged for them. Source: mincore(2)."""
    num_bytes, page_bytes = path.stat().st_size, mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    flags = np.zeros(-(-num_bytes // page_bytes), np.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
        # a private writable mapping: only of those does ctypes give the address; nothing is written
        with mmap.mmap(fd, num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.addressof(first), num_bytes, flags.ctypes.data)
            del first
    finally:
        os.close(fd)
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path.name}")
    return int((flags & 1).sum()) * page_bytes
