"""Model files opened past the page cache: direct where it works, buffered and dropped again where it does not."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipo.base.errors import FileChanged, ModelNotFound, ReadFailed, UnexpectedEof
from pipo.base.units import round_down

log = logging.getLogger(__name__)

PAGE = 4096
_F_NOCACHE = 48  # macOS fcntl
Preadv = Callable[[int, Sequence[memoryview], int], int]


class UncachedFile:
    """One open file. Threads: any number of readers."""

    def __init__(self, path: Path, *, direct: bool, preadv: Preadv) -> None:
        self.path = path
        self._preadv = preadv
        self._identity = _identity(os.stat(_existing(path)))
        self.is_direct = direct
        self._buffered_fd = -1
        try:
            self._fd = self._open_direct() if direct else self._open_buffered()
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise ReadFailed(
                    f"cannot open: {error.strerror}", path=str(path), offset=0, wanted_bytes=0, got_bytes=0
                ) from error
            self._fall_back(error)

    @property
    def num_bytes(self) -> int:
        return self._identity[2]

    def read(self, view: memoryview, offset: int, useful_bytes: int) -> None:
        """Fill `view` from `offset` until at least `useful_bytes` have arrived.

        `offset`, the view's address and its length are whole pages; the rest of the view beyond `useful_bytes` may
        or may not be filled. Raises UnexpectedEof, ReadFailed.
        """
        got = 0
        while got < useful_bytes:
            done = self._read_some(view[got:], offset + got, offset, useful_bytes, got)
            got += done
            if got < useful_bytes:
                got = round_down(got, PAGE)  # a direct read goes on from a page border
                if done == 0 or (done < PAGE and offset + got + done >= self.num_bytes):
                    raise UnexpectedEof(
                        "the file ends early", path=str(self.path), offset=offset, wanted_bytes=useful_bytes,
                        got_bytes=got + done, hint="the file is truncated: fetch it again",
                    )  # fmt: skip
        if not self.is_direct:
            _drop(self._fd, offset, got)

    def check(self, *, by_path: bool = False) -> None:
        """Raises FileChanged when this is no longer the file that was opened."""
        try:
            now = _identity(os.stat(self.path) if by_path else os.fstat(self._fd))
        except OSError:
            now = (0, 0, 0, 0)
        if now != self._identity:
            raise FileChanged(
                "the model file changed while it was in use", path=str(self.path), offset=0,
                wanted_bytes=self._identity[2], got_bytes=now[2], hint="start again with the new file",
            )  # fmt: skip

    def close(self) -> None:
        os.close(self._fd)

    def _read_some(self, view: memoryview, at: int, offset: int, useful_bytes: int, got: int) -> int:
        try:
            return self._preadv(self._fd, [view], at)
        except OSError as error:
            if self.is_direct and error.errno == errno.EINVAL:
                self._fall_back(error)
                return self._read_some(view, at, offset, useful_bytes, got)
            raise ReadFailed(
                f"read failed ({error.strerror})", path=str(self.path), offset=offset, wanted_bytes=useful_bytes,
                got_bytes=got, hint="the drive or file system reported an error; see the system log",
            ) from error  # fmt: skip

    def _open_direct(self) -> int:
        if sys.platform == "darwin":
            import fcntl

            fd = os.open(self.path, os.O_RDONLY)
            fcntl.fcntl(fd, _F_NOCACHE, 1)
            return fd
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOTSUP, "this system has no direct reads")
        return os.open(self.path, os.O_RDONLY | os.O_DIRECT)

    def _open_buffered(self) -> int:
        fd = os.open(self.path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # our reads are large and planned: no read-ahead
        return fd

    def _fall_back(self, error: OSError) -> None:
        """From direct to buffered reads, said once per file. The old descriptor stays open for reads in flight."""
        self._buffered_fd = self._fd = self._open_buffered()
        self.is_direct = False
        log.warning("direct reads refused, using buffered ones path=%s reason=%r", self.path, error.strerror)


def _drop(fd: int, offset: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file")
    return path


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
