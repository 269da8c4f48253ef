"""Bring a file over the network whole or not at all: resumed after a break, compared, renamed at the end.

Until then the bytes are in `NAME.part`, which the next call continues. Threads: any, but one per destination.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import ssl
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pipo.base.errors import DownloadError
from pipo.base.units import MIB, format_size
from pipo.store.library import Expected

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is done ("download", "unpack"), bytes so far, bytes in all
_CHUNK_BYTES = MIB
_LONGEST_WAIT_S = 8.0
_NOT_THE_FILE = "the published file is not the one pipo knows, or a proxy answered in its place"


def silent(what: str, done_bytes: int, num_bytes: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often to try, the wait after the first failure (it doubles), and how long the server may say nothing."""

    num_tries: int = 8
    wait_s: float = 0.5
    timeout_s: float = 30.0


class NoAccess(DownloadError):
    """The server wants credentials, its certificate is not trusted, or not a byte came: pip may be set up for it."""


class _Dropped(Exception):
    """The connection broke or the server is busy: worth another try."""


class _Unresumable(_Dropped):
    """The server cannot continue where our part ends."""


def download(
    url: str, path: Path, expected: Expected, *, progress: Progress = silent, patience: Patience | None = None
) -> None:
    """Fetch `url` (http, https or file) to `path`. A part left by an earlier call is continued.

    Raises: NoAccess; DownloadError, after which nothing new is at `path`.
    """
    part = part_path(path)
    with _disk_errors(path):
        check_space(path.parent, expected.num_bytes - _size(part))
        is_continued = _size(part) > 0
        _receive_all(url, part, expected, progress, patience or Patience())
        if is_continued and not is_intact(part, expected):
            log.warning("part=%s reason=%r action=restart", part, "checksum differs")
            part.unlink()
            _receive_all(url, part, expected, progress, patience or Patience())
        _publish(part, path, expected, url)


def unpack(archive: Path, member: str, path: Path, expected: Expected, *, progress: Progress = silent) -> None:
    """Extract one file of a zip. Raises DownloadError, after which nothing new is at `path`."""
    part = part_path(path)
    with _disk_errors(path):
        check_space(path.parent, expected.num_bytes)
        try:
            with zipfile.ZipFile(archive) as opened, opened.open(member) as source, part.open("wb") as out:
                _copy(source.read, out, 0, expected, lambda *done: progress("unpack", *done))
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            part.unlink(missing_ok=True)
            raise DownloadError(f"{archive}: {member} cannot be unpacked: {error}", hint=_NOT_THE_FILE) from error
        _publish(part, path, expected, str(archive))


def is_intact(path: Path, expected: Expected) -> bool:
    """Whether the file has the size and SHA-256. Cost: reads it all, about 1 GB/s."""
    if _size(path) != expected.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256


def part_path(path: Path) -> Path:
    """Where the bytes are until they are complete."""
    return path.with_name(f"{path.name}.part")


def check_space(folder: Path, wanted_bytes: int) -> None:
    """Make the folder and see that the bytes fit. Raises DownloadError."""
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes:
        raise DownloadError(
            f"{folder} needs {format_size(wanted_bytes)}, {format_size(free_bytes)} are free",
            hint="free some space, or name a folder on another drive with XDG_CACHE_HOME",
        )


def _publish(part: Path, path: Path, expected: Expected, source: str) -> None:
    if not is_intact(part, expected):
        got = format_size(_size(part))
        part.unlink()
        raise DownloadError(
            f"{_shown(source)}: {got} arrived, but their SHA-256 is not {expected.sha256}", hint=_NOT_THE_FILE
        )
    part.replace(path)


def _receive_all(url: str, part: Path, expected: Expected, progress: Progress, patience: Patience) -> None:
    """Continue `part` until it has all bytes."""
    reason = ""
    for num_failures in range(patience.num_tries):
        if _size(part) > expected.num_bytes:
            part.unlink()
        if _size(part) == expected.num_bytes:
            return
        if num_failures:
            time.sleep(min(patience.wait_s * 2 ** (num_failures - 1), _LONGEST_WAIT_S))
        try:
            _receive(url, part, expected, progress, patience.timeout_s)
        except _Dropped as error:
            reason = str(error)
            log.warning("url=%s got_bytes=%d reason=%r action=retry", _shown(url), _size(part), reason)
            if isinstance(error, _Unresumable):
                part.unlink(missing_ok=True)
    if _size(part) != expected.num_bytes:
        kind = DownloadError if _size(part) else NoAccess
        raise kind(
            f"{_shown(url)}: gave up after {patience.num_tries} tries with {_size(part)} of {expected.num_bytes} bytes"
            f": {reason}",
            hint="run it again: it continues where it stopped",
        )


def _receive(url: str, part: Path, expected: Expected, progress: Progress, timeout_s: float) -> None:
    """One connection: append what it brings. Raises _Dropped when that is not everything."""
    with _open(url, _size(part), timeout_s) as response, part.open("ab") as out:
        offset = _start_offset(response, _size(part), expected, url)
        out.truncate(offset)
        end = _copy(_reader(response), out, offset, expected, lambda *done: progress("download", *done))
    if end < expected.num_bytes:
        raise _Dropped("the server closed the connection early")


def _open(url: str, offset: int, timeout_s: float) -> Any:
    """The response; asks for the bytes from `offset` on."""
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise DownloadError(f"{_shown(url)}: only http, https and file addresses can be fetched")
    headers = {"User-Agent": "pipo", **({"Range": f"bytes={offset}-"} if offset else {})}
    try:
        return urlopen(Request(url, headers=headers), timeout=timeout_s)
    except HTTPError as error:
        with error:
            raise _classified(error, url) from error
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise NoAccess(f"{_shown(url)}: {error.reason}") from error
        if isinstance(error.reason, FileNotFoundError) or url.startswith("file:"):
            raise DownloadError(f"{_shown(url)}: {error.reason}") from error
        raise _Dropped(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(repr(error)) from error


def _classified(error: HTTPError, url: str) -> Exception:
    what = f"HTTP {error.code} {error.reason}"
    if error.code == 416:
        return _Unresumable(what)
    if error.code in (408, 425, 429) or error.code >= 500:
        return _Dropped(what)
    kind = NoAccess if error.code in (401, 403, 407) else DownloadError
    return kind(f"{_shown(url)}: {what}")


def _start_offset(response: Any, offset: int, expected: Expected, url: str) -> int:
    """Where the response's first byte belongs: 0 from a server that knows no ranges."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset:
            raise _Unresumable("the server sent another range than the one asked for")
        total = match[2]
    else:
        offset, total = 0, response.headers.get("Content-Length", "*")
    if total.isdecimal() and int(total) != expected.num_bytes:
        raise DownloadError(
            f"{_shown(url)}: wanted {expected.num_bytes} bytes, the server has {total}", hint=_NOT_THE_FILE
        )
    return offset


def _reader(response: Any) -> Callable[[int], bytes]:
    def read(num_bytes: int) -> bytes:
        try:
            data: bytes = response.read(num_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise _Dropped(repr(error)) from error
        return data

    return read


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
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses, as a DownloadError; the network's errors were named before they come here."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"cannot write {path}: {error}", hint="XDG_CACHE_HOME names another place for pipo's files"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _shown(url: str) -> str:
    """Without the password that an index address may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
