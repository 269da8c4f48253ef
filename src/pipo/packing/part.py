"""The output until it is complete: `FILE.part`, written past the page cache, then renamed at once.

Threads: one.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipo.base.errors import OutputFailed
from pipo.base.page_cache import forget_cached
from pipo.base.units import PAGE_BYTES, format_size, round_up
from pipo.tiers.ram import Place

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

Pwrite = Callable[[int, memoryview, int], int]  # os.pwrite, or a disk that is full in tests
_FULL = (errno.ENOSPC, errno.EDQUOT)


class PartFile:
    """`path`.part, open and locked against a second pipo. Offsets and lengths of writes are whole pages.

    Raises OutputFailed from every method, naming the file and what the system said.
    """

    def __init__(self, path: Path, *, pwrite: Pwrite = os.pwrite) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self._pwrite = pwrite
        self._unsynced: list[tuple[int, int]] = []
        with self._named_errors():
            self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            self._direct_fd = _open_direct(self.part)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def check_space(self, num_bytes: int) -> None:
        """Raises OutputFailed where the file cannot grow to `num_bytes`; what it has on the disk already counts."""
        with self._named_errors():
            has_bytes = min(os.fstat(self._fd).st_blocks * 512, num_bytes)
            free_bytes = shutil.disk_usage(self.path.parent).free
        wanted_bytes = num_bytes - has_bytes
        if wanted_bytes > free_bytes:
            raise OutputFailed(
                f"{self.path} needs {format_size(wanted_bytes)} more ({wanted_bytes} bytes), "
                f"{format_size(free_bytes)} ({free_bytes} bytes) are free in {self.path.parent}",
                hint="free some space, or write to another drive",
            )

    def empty(self) -> None:
        with self._named_errors():
            os.ftruncate(self._fd, 0)

    def write(self, view: memoryview, offset: int) -> None:
        """Whole pages, from memory that begins on one."""
        assert offset % PAGE_BYTES == 0 and len(view) % PAGE_BYTES == 0
        with self._named_errors():
            start, end = offset, offset + len(view)
            while offset < end:
                offset += self._write_once(view[offset - start :], offset)
        self._unsynced.append((start, end - start))

    def sync(self) -> None:
        """What was written is on the disk, and in the page cache no more."""
        with self._named_errors():
            os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        for start, num_bytes in self._unsynced:
            forget_cached(self._fd, start, num_bytes)
        self._unsynced.clear()

    def publish(self, num_bytes: int) -> None:
        """Give the whole file its name. Whoever looks there sees the old file or the new one, never a part."""
        with self._named_errors():
            os.ftruncate(self._fd, num_bytes)
            os.fsync(self._fd)
            self.part.replace(self.path)
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind; the file stays open until `close`."""
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def close(self) -> None:
        if self._direct_fd is not None:
            os.close(self._direct_fd)
        os.close(self._fd)

    def _write_once(self, view: memoryview, offset: int) -> int:
        if self._direct_fd is not None and len(view) % PAGE_BYTES == 0:
            try:
                return self._pwrite(self._direct_fd, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                log.warning("file=%s direct_io=off reason=refused at the first write", self.part)
                os.close(self._direct_fd)
                self._direct_fd = None
        return self._pwrite(self._fd, view, offset)

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self._is_taken() from error
        # whoever had it before may have given it its name meanwhile: then this is a finished file
        if not self.part.exists() or not os.path.samestat(self.part.stat(), os.fstat(self._fd)):
            raise self._is_taken()

    def _is_taken(self) -> OutputFailed:
        return OutputFailed(f"another pipo is packing into {self.part}", hint="wait until it has ended")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise output_failed(self.part, error) from error


def output_failed(path: Path, error: OSError) -> OutputFailed:
    """What the system said, with the room there is where that is the matter."""
    what = f"cannot write {path}: {error.strerror or error}"
    if error.errno not in _FULL:
        return OutputFailed(what, hint="a folder that can be written to would do")
    with suppress(OSError):
        what += f", {format_size(shutil.disk_usage(path.parent).free)} are free"
    return OutputFailed(what, hint="free some space and run the same command again: it goes on where it was")


def sync_folder(folder: Path) -> None:
    """A new name is on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class TensorWriter:
    """The bytes of one tensor, as they come, into whole pages of a staging place and from there into the file."""

    def __init__(self, part: PartFile, staging: Place, offset: int) -> None:
        self._part, self._staging = part, staging
        self._offset, self._filled = offset, 0

    def append(self, view: memoryview) -> None:
        while view:
            size = min(len(view), self._staging.num_bytes - self._filled)
            self._staging.view[self._filled : self._filled + size] = view[:size]
            self._filled += size
            view = view[size:]
            if self._filled == self._staging.num_bytes:
                self._flush(self._filled)

    def finish(self) -> None:
        """Zeros up to the end of the page."""
        end = round_up(self._filled, PAGE_BYTES)
        self._staging.view[self._filled : end] = bytes(end - self._filled)
        self._flush(end)

    def _flush(self, num_bytes: int) -> None:
        if num_bytes:
            self._part.write(self._staging.view[:num_bytes], self._offset)
        self._offset += num_bytes
        self._filled = 0


def _open_direct(path: Path) -> int | None:
    """None where the file system has no such writes."""
    if sys.platform != "linux":
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise output_failed(path, error) from error
        log.warning("file=%s direct_io=off reason=refused at open", path)
        return None
