"""Bring a file over the network whole or not at all: resumed after a break, compared, renamed at the end.

Until then the bytes are in a part beside it, which the next call continues. Threads: any, but one per destination.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from pipo.base.errors import DownloadError
from pipo.base.units import GIB, MIB, format_size
from pipo.store.library import Expected
from pipo.store.request import Address, Dropped, NoAccess, Unresumable, content_start, open_url, reader

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is done ("download", "verify", …), bytes so far, bytes in all
_CHUNK_BYTES = MIB
_LONGEST_WAIT_S = 8.0
_LONGEST_ASKED_WAIT_S = 120.0  # a server that says Retry-After is given that long
_PIECE_BYTES = 32 * GIB  # at a time: networks that deliver files refuse more than some 50 GB in one answer
_NOT_THE_FILE = "the published file is not the one pipo knows, or a proxy answered in its place"


def silent(what: str, done_bytes: int, num_bytes: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often to try, the wait after the first failure (it doubles), and how long the server may say nothing."""

    num_tries: int = 8
    wait_s: float = 0.5
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a file is to be. `variable` names another place for it, where this one is full or closed."""

    path: Path
    part_suffix: str = ".part"
    variable: str = "XDG_CACHE_HOME"

    @property
    def part(self) -> Path:
        """Where the bytes are until they are complete."""
        return self.path.with_name(f"{self.path.name}{self.part_suffix}")


def download(
    address: str | Address,
    to: Path | Destination,
    expected: Expected,
    *,
    progress: Progress = silent,
    patience: Patience | None = None,
) -> None:
    """Fetch http, https or file to a path. A part left by an earlier call is continued.

    Raises: NoAccess; DownloadError, after which nothing new is at the path.
    """
    address = Address(address) if isinstance(address, str) else address
    to = Destination(to) if isinstance(to, Path) else to
    fetching = _Fetching(address, to.part, expected, progress, patience or Patience())
    with _disk_errors(to):
        check_space(to.path.parent, expected.num_bytes - _size(to.part), to.variable)
        is_continued = _size(to.part) > 0
        fetching.receive_all()
        if is_continued and is_intact(to.part, expected, progress):
            to.part.replace(to.path)
            return
        if is_continued:
            log.warning("part=%s reason=%r action=restart", to.part, "checksum differs")
            to.part.unlink()
            fetching.receive_all()
        _publish(to.part, to.path, expected, str(address), progress)


def unpack(archive: Path, member: str, path: Path, expected: Expected, *, progress: Progress = silent) -> None:
    """Extract one file of a zip. Raises DownloadError, after which nothing new is at `path`."""
    to = Destination(path)
    with _disk_errors(to):
        check_space(path.parent, expected.num_bytes)
        try:
            with zipfile.ZipFile(archive) as opened, opened.open(member) as source, to.part.open("wb") as out:
                _copy(source.read, out, 0, expected, lambda *done: progress("unpack", *done))
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            to.part.unlink(missing_ok=True)
            raise DownloadError(f"{archive}: {member} cannot be unpacked: {error}", hint=_NOT_THE_FILE) from error
        _publish(to.part, path, expected, str(archive))


def is_intact(path: Path, expected: Expected, progress: Progress = silent) -> bool:
    """Whether the file has the size and the hash. Cost: reads it all, about 1 GB/s."""
    if not path.is_file() or _size(path) != expected.num_bytes:
        return False
    made = hashlib.sha256() if expected.sha256 else hashlib.sha1(b"blob %d\0" % expected.num_bytes)
    done = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            made.update(chunk)
            done += len(chunk)
            progress("verify", done, expected.num_bytes)
    return made.hexdigest() == (expected.sha256 or expected.git_sha1)


def part_path(path: Path) -> Path:
    """Where the bytes are until they are complete."""
    return Destination(path).part


def check_space(folder: Path, wanted_bytes: int, variable: str = "XDG_CACHE_HOME") -> None:
    """Make the folder and see that the bytes fit. `variable` names another one. Raises DownloadError."""
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes:
        raise DownloadError(
            f"{folder} needs {format_size(wanted_bytes)}, {format_size(free_bytes)} are free",
            hint=f"free some space, or name a folder on another drive with {variable}",
        )


def _publish(part: Path, path: Path, expected: Expected, source: str, progress: Progress = silent) -> None:
    if not is_intact(part, expected, progress):
        got = format_size(_size(part))
        part.unlink()
        raise DownloadError(f"{source}: {got} arrived, but their {expected.hash_text}", hint=_NOT_THE_FILE)
    part.replace(path)


@dataclass(frozen=True, slots=True)
class _Fetching:
    """One file on its way into its part."""

    address: Address
    part: Path
    expected: Expected
    progress: Progress
    patience: Patience

    @property
    def is_complete(self) -> bool:
        return _size(self.part) == self.expected.num_bytes and self.part.exists()

    def receive_all(self) -> None:
        """Continue the part until it has all bytes. Tries are counted from the last one that brought a chunk."""
        num_failures, reason, most_bytes = 0, "", _size(self.part)
        if _size(self.part) > self.expected.num_bytes:
            self.part.unlink()
        while not self.is_complete and num_failures < self.patience.num_tries:
            try:
                self._receive()
            except Dropped as error:
                reason = str(error)
                num_failures = 1 if _size(self.part) - most_bytes >= _CHUNK_BYTES else num_failures + 1
                most_bytes = max(most_bytes, _size(self.part))
                self._wait(error, num_failures)
        if not self.is_complete:
            kind = DownloadError if _size(self.part) else NoAccess
            raise kind(
                f"{self.address}: gave up after {num_failures} tries with {_size(self.part)} of "
                f"{self.expected.num_bytes} bytes: {reason}",
                hint="run it again: it continues where it stopped",
            )

    def _wait(self, error: Dropped, num_failures: int) -> None:
        log.warning("url=%s got_bytes=%d reason=%r action=retry", self.address, _size(self.part), str(error))
        if isinstance(error, Unresumable):
            self.part.unlink(missing_ok=True)
        if error.wait_s > _LONGEST_ASKED_WAIT_S:
            raise DownloadError(
                f"{self.address}: {error}, and wants {error.wait_s:.0f} s until the next request",
                hint="run it again then: it continues where it stopped",
            )
        if num_failures < self.patience.num_tries:
            own_wait_s = min(self.patience.wait_s * 2 ** (num_failures - 1), _LONGEST_WAIT_S)
            time.sleep(max(error.wait_s, own_wait_s))

    def _receive(self) -> None:
        """One connection: append what it brings. Raises Dropped when that is less than was asked for."""
        offset = _size(self.part)
        end = min(offset + _PIECE_BYTES, self.expected.num_bytes)
        range_ = f"{offset}-" if end == self.expected.num_bytes else f"{offset}-{end - 1}"
        with open_url(self.address, range_, self.patience.timeout_s) as response, self.part.open("ab") as out:
            offset, total = content_start(response, offset)
            if total not in (None, self.expected.num_bytes):
                wanted = f"wanted {self.expected.num_bytes} bytes, the server has {total}"
                raise DownloadError(f"{self.address}: {wanted}", hint=_NOT_THE_FILE)
            out.truncate(offset)
            report = partial(self.progress, "download")
            got = _copy(reader(response), out, offset, self.expected, report)
        if got < end:
            raise Dropped("the server closed the connection early")


def _copy(
    read: Callable[[int], bytes], out: IO[bytes], offset: int, expected: Expected, report: Callable[[int, int], None]
) -> int:
    """Copy until the source ends and sync; returns the end offset. Raises DownloadError if there is too much."""
    try:
        while chunk := read(_CHUNK_BYTES):
            offset += len(chunk)
            if offset > expected.num_bytes:
                raise DownloadError(f"{out.name}: more than the {expected.num_bytes} bytes wanted", hint=_NOT_THE_FILE)
            out.write(chunk)
            report(offset, expected.num_bytes)
    finally:
        out.flush()
        os.fsync(out.fileno())
    return offset


@contextmanager
def _disk_errors(to: Destination) -> Iterator[None]:
    """What the disk refuses, as a DownloadError; the network's errors were named before they come here."""
    try:
        yield
    except BrokenPipeError:  # of whoever is told how far it is
        raise
    except OSError as error:
        raise DownloadError(
            f"cannot write {to.path}: {error}", hint=f"{to.variable} names another place for such files"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
