"""Model files opened past the page cache, and reads that end with all the bytes or a typed error."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pipo.base.errors import FileChanged, ReadFailed, TransferError, UnexpectedEof
from pipo.base.file_identity import FileIdentity
from pipo.base.page_cache import forget_cached
from pipo.base.units import PAGE_BYTES, round_down

if sys.platform == "darwin":
    import fcntl

log = logging.getLogger(__name__)

ALIGNMENT = PAGE_BYTES  # of offsets, lengths and addresses; a multiple of every drive's logical block in use
_DRIVES_TOLD_OF: set[int] = set()  # that refuse direct reads
_MAX_STALLS = 4  # reads in a row that return less than a block from the middle of a file

Preadv = Callable[[int, Sequence[memoryview], int], int]  # os.preadv, or a faulty one in tests


class UncachedFile:
    """One file open for reading: directly where the file system allows it, else through the page cache, which is
    emptied behind each read. Threads: `read` from any.
    """

    def __init__(
        self,
        path: Path,
        *,
        direct: bool = True,
        preadv: Preadv = os.preadv,
        identity: FileIdentity | None = None,
    ) -> None:
        """`identity` is the version that is wanted, where the caller has read something from it before.

        Raises ReadFailed when the file cannot be opened, FileChanged when it is another version.
        """
        self.path = path
        self.is_direct = False
        self._preadv = preadv
        self._lock = threading.Lock()
        self._fds: list[int] = []  # the last one serves; one that was given up may still be inside a read
        try:
            self._open(direct)
        except OSError as error:
            raise self._error(ReadFailed, f"cannot open ({_name_of(error)})", 0, 0, 0) from error
        found = FileIdentity.of(os.fstat(self._fds[0]))
        self.identity = identity or found
        try:
            self._compare(found)
        except FileChanged:
            self.close()
            raise

    def read(self, view: memoryview, offset: int, needed_bytes: int) -> int:
        """Fill `view` from `offset`; both must be aligned. Returns the bytes read, at least `needed_bytes`.

        The file may end between `needed_bytes` and the end of the view. Raises ReadFailed, UnexpectedEof.
        """
        done = total = stalls = 0
        while True:
            got = self._read_once(view[done:] if done else view, offset + done, needed_bytes - done)
            total += got
            if done + got >= needed_bytes:
                break
            if not got or offset + done + got >= self._size_now():
                raise self._error(UnexpectedEof, "the file ends too early", offset, needed_bytes, done + got)
            # a direct read can only go on from a whole block
            step = round_down(got, ALIGNMENT) if self.is_direct else got
            stalls = 0 if step else stalls + 1
            if stalls == _MAX_STALLS:
                raise self._error(ReadFailed, "the drive returns too little", offset, needed_bytes, done + got)
            done += step
        if not self.is_direct:
            forget_cached(self._fds[-1], offset, len(view))
        return total

    def check_unchanged(self) -> None:
        """Raises FileChanged when the open file was written to or cut. Cost: one fstat, about 1 µs.

        Does nothing after `close`, which may happen on another thread meanwhile.
        """
        with self._lock:
            found = FileIdentity.of(os.fstat(self._fds[0])) if self._fds else self.identity
        self._compare(found)

    def check_path(self) -> None:
        """Raises FileChanged when the path now names another file, or none."""
        try:
            found = FileIdentity.of(self.path.stat())
        except OSError as error:
            raise self._error(FileChanged, "the file is gone", 0, self.identity.num_bytes, 0) from error
        self._compare(found)

    def close(self) -> None:
        with self._lock:
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()

    def _open(self, direct: bool) -> None:
        if direct:
            try:
                self._fds.append(_open_uncached(self.path))
                self.is_direct = True
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._log_fallback("refused at open")
        self._fds.append(_open_buffered(self.path))

    def _read_once(self, view: memoryview, offset: int, needed_bytes: int) -> int:
        was_direct, fd = self.is_direct, self._fds[-1]
        try:
            return self._preadv(fd, [view], offset)
        except OSError as error:
            if not was_direct or error.errno != errno.EINVAL:
                # without traceback: its frames would keep the place's memory alive as long as the error
                cause = error.with_traceback(None)
                raise self._error(ReadFailed, f"cannot read ({_name_of(error)})", offset, needed_bytes, 0) from cause
        self._fall_back()
        return self._read_once(view, offset, needed_bytes)

    def _fall_back(self) -> None:
        """Some file systems accept O_DIRECT at open and refuse it at the first read."""
        with self._lock:
            if self.is_direct:
                self._log_fallback("refused at the first read")
                self._fds.append(_open_buffered(self.path))
                self.is_direct = False

    def _log_fallback(self, reason: str) -> None:
        """Once per drive."""
        device = self.path.stat().st_dev
        if device in _DRIVES_TOLD_OF:
            return
        _DRIVES_TOLD_OF.add(device)
        log.warning("file=%s direct_io=off reason=%s", self.path, reason)

    def _size_now(self) -> int:
        return os.fstat(self._fds[0]).st_size

    def _compare(self, found: FileIdentity) -> None:
        if found != self.identity:
            wanted, got = self.identity.num_bytes, found.num_bytes
            raise self._error(FileChanged, "the file was changed while in use", 0, wanted, got)

    def _error(
        self, kind: type[TransferError], message: str, offset: int, wanted_bytes: int, got_bytes: int
    ) -> TransferError:
        hint = "leave the file alone and start again" if kind is FileChanged else None
        path = str(self.path)
        return kind(message, path=path, offset=offset, wanted_bytes=wanted_bytes, got_bytes=got_bytes, hint=hint)


def _open_uncached(path: Path) -> int:
    """A descriptor whose reads leave nothing in the page cache. Raises OSError EINVAL where there is no such thing."""
    if sys.platform == "linux":
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    if sys.platform == "darwin":
        fd = os.open(path, os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        return fd
    raise OSError(errno.EINVAL, "no direct reads on this platform")


def _open_buffered(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    if sys.platform == "linux":
        # no read-ahead: what it brings in beyond a read would stay in the page cache
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def _name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))
