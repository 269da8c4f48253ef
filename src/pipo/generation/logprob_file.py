"""A reference's log-probabilities on disk, between its run and the run of the model that is held against it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pipo.base.errors import TransferError, UnexpectedEof, UsageError
from pipo.base.page_cache import forget_cached
from pipo.base.units import MIB, format_size
from pipo.generation.scoring import Steps

_SYNC_BYTES = 32 * MIB  # after which the page cache is emptied: the memory is somebody else's
STEP_BYTES = 2


class LogprobFile:
    """Rows of 16-bit steps in a file without a name: however this process ends, it is gone. A context manager.

    Written from the first row to the last, then read in that order. Threads: one at a time.
    Raises UsageError where `folder` cannot hold so many rows.
    """

    def __init__(self, folder: Path, num_rows: int, vocab_size: int) -> None:
        self._folder = folder
        self._row_bytes = vocab_size * STEP_BYTES
        self._offset = self._synced = 0
        wanted = num_rows * self._row_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(folder).free
            if wanted > free_bytes:
                raise _no_room(folder, wanted, free_bytes)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by `__exit__`
        except OSError as error:
            raise UsageError(
                f"--tmp-dir {folder}: cannot be written to: {error.strerror}", hint="name another folder"
            ) from error

    def __enter__(self) -> LogprobFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, steps: Steps) -> None:
        """The next row. Raises TransferError."""
        self._move(steps, self._file.write, "written")
        if self._offset - self._synced >= _SYNC_BYTES:
            self._sync()

    def rewind(self) -> None:
        """All rows are written: read from the first one on."""
        self._file.seek(0)
        self._offset = self._synced = 0

    def read_into(self, steps: Steps) -> None:
        """The next row. Raises TransferError."""
        self._move(steps, self._file.readinto, "read")
        if self._offset - self._synced >= _SYNC_BYTES:
            self._forget()

    def _move(self, steps: Steps, move: Callable[[memoryview], int | None], word: str) -> None:
        view, done = steps.data.cast("B"), 0
        while done < len(view):
            try:
                count = move(view[done:]) or 0
            except OSError as error:
                raise self._failure(TransferError, f"cannot be {word} ({_name_of(error)})", done) from error
            if not count:
                raise self._failure(UnexpectedEof, "ends too early", done)
            done += count
        self._offset += done

    def _failure(self, kind: type[TransferError], message: str, done: int) -> TransferError:
        return kind(
            f"the reference's log-probabilities: a temporary file {message}",
            path=str(self._folder),
            offset=self._offset,
            wanted_bytes=self._row_bytes,
            got_bytes=done,
            hint="--tmp-dir names another folder, --max-windows takes less of the text",
        )

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(TransferError, f"cannot be written ({_name_of(error)})", 0) from error
        self._forget()

    def _forget(self) -> None:
        forget_cached(self._file.fileno(), self._synced, self._offset - self._synced)
        self._synced = self._offset


def _no_room(folder: Path, wanted_bytes: int, free_bytes: int) -> UsageError:
    return UsageError(
        f"the reference's log-probabilities take {format_size(wanted_bytes)} in {folder}, where "
        f"{format_size(free_bytes)} are free",
        hint="--tmp-dir names a folder on another drive, --max-windows takes less of the text",
    )


def _name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))
