"""What of a job is answered: `OUTPUT.journal`, a line for each row, appended and synced in groups.

The first line says which job this is; a journal of another one is refused. A process that is killed while it appends
leaves half a line, which is cut off. Rows stand in the order in which they were answered.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pipo.base.errors import OutputFailed, UsageError
from pipo.jobs.answers import Answer
from pipo.packing.part import output_failed, sync_folder

FORMAT = 1
Write = Callable[[int, bytes], int]  # os.write, or a disk that is full in tests
_IDENTITY = ("model", "input", "settings")  # that of a journal must be the same; what follows from them is not compared
_BEGIN = b'{"chosen"'  # of the first line, as `to_line` has it
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """What the answers depend on, and `chosen`: what the first start made of it, which a resumed job keeps."""

    model: Mapping[str, object]
    input: Mapping[str, object]
    settings: Mapping[str, object]
    chosen: Mapping[str, int]

    def to_line(self) -> bytes:
        values = {"pipo_batch": FORMAT, **{name: getattr(self, name) for name in (*_IDENTITY, "chosen")}}
        return json.dumps(values, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> JobIdentity | None:
        try:
            values = json.loads(line)
            parts = [values[name] for name in (*_IDENTITY, "chosen")]
        except (ValueError, TypeError, KeyError):
            return None
        is_sound = values.get("pipo_batch") == FORMAT and all(isinstance(part, dict) for part in parts)
        is_sound = is_sound and all(isinstance(value, int) for value in parts[-1].values())
        return cls(*parts) if is_sound else None

    def check_same(self, other: JobIdentity, path: Path) -> None:
        """Raises UsageError naming what differs. `other` is what is wanted now."""
        for name in _IDENTITY:
            ours, theirs = getattr(self, name), json.loads(json.dumps(getattr(other, name)))
            keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            if keys:
                key, was, now = keys[0], ours.get(keys[0]), theirs.get(keys[0])
                if isinstance(was, dict) and isinstance(now, dict):
                    key = next(each for each in sorted({*was, *now}) if was.get(each) != now.get(each))
                    was, now = was.get(key), now.get(key)
                raise UsageError(
                    f"{path} is of another job: its {name} has {key} {was!r:.120}, now it is {now!r:.120}",
                    hint="the same command with --resume goes on; --overwrite throws it away and begins anew",
                )


class Journal:
    """Open for appending, locked against a second pipo. Raises OutputFailed. Threads: any."""

    def __init__(self, path: Path, *, write: Write = os.write) -> None:
        self.path = path
        self._write = write
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            _lock_file(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    def begin(self, identity: JobIdentity) -> None:
        """Empty but for the first line."""
        try:
            os.ftruncate(self._fd, 0)
            self._append(identity.to_line())
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def identity(self) -> JobIdentity | None:
        """None where there is no whole first line: nothing was begun. Raises UsageError for what is no journal."""
        _, line = next(self._lines(), (0, b""))
        begun = line or os.pread(self._fd, len(_BEGIN), 0)
        if not line and _BEGIN.startswith(begun):
            return None
        found = JobIdentity.from_line(line)
        if found is None:
            raise UsageError(f"{self.path} is not a journal of this pipo's", hint="--overwrite begins anew")
        return found

    def has_answers(self) -> bool:
        """At least one: a job that never came so far has nothing to lose."""
        return os.path.lexists(self.path) and any(i for i, _ in enumerate(self._lines()))

    def repair(self, on_answer: Callable[[Answer], None]) -> None:
        """Show the answers there are, and cut off what follows the last whole one."""
        end = 0
        for i, (offset, line) in enumerate(self._lines()):
            answer = Answer.from_line(line) if i else None
            if i and answer is None:
                break
            end = offset + len(line)
            if answer is not None:
                on_answer(answer)
        try:
            os.ftruncate(self._fd, end)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, answers: Sequence[Answer]) -> list[int]:
        """They are on the disk. Where each begins, for `read`."""
        lines = [answer.to_line() for answer in answers]
        with self._lock:
            try:
                offset = self._append(b"".join(lines))
            except OSError as error:
                raise cannot_write(self.path, error) from error
        return list(accumulate(map(len, lines[:-1]), initial=offset)) if lines else []

    def read(self, offset: int) -> Answer:
        """The one that begins there."""
        line = b""
        while b"\n" not in line:
            data = os.pread(self._fd, _READ_BYTES, offset + len(line))
            if not data:
                raise OutputFailed(f"{self.path} ends in the middle of an answer", hint="something else changed it")
            line += data
        answer = Answer.from_line(line[: line.index(b"\n") + 1])
        if answer is None:
            raise OutputFailed(f"{self.path} has no answer at byte {offset}", hint="something else changed it")
        return answer

    def in_order(self, num_rows: int) -> Iterator[Answer]:
        """Of rows 0, 1, …; all must be there. Keeps where those are that were answered early: 100 bytes each."""
        early: dict[int, int] = {}
        lines = self._lines()
        next(lines, None)
        for row in range(num_rows):
            while row not in early:
                offset, line = next(lines, (0, b""))
                answer = Answer.from_line(line)
                if answer is None:
                    raise OutputFailed(f"{self.path} has no answer for row {row}", hint="--resume computes it")
                early.setdefault(answer.row, offset)
            yield self.read(early.pop(row))

    def remove(self) -> None:
        with suppress(OSError):  # nobody needs it once the output is there
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, data: bytes) -> int:
        """At the end, whole or not at all but for a crash."""
        begin = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            done = 0
            while done < len(data):
                done += self._write(self._fd, data[done:])
            os.fsync(self._fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, begin)
            raise
        return begin

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Whole lines and where they begin."""
        try:
            with self.path.open("rb") as stream:
                offset = 0
                for line in stream:
                    if line.endswith(b"\n"):
                        yield offset, line
                    offset += len(line)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def cannot_write(path: Path, error: OSError) -> OutputFailed:
    """What the system said. What was answered before is kept."""
    failed = output_failed(path, error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        failed.hint = "what was answered is kept: free some space, then the same command with --resume"
    return failed


def _lock_file(fd: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputFailed(
            f"another pipo works on {path}", hint="wait until it has ended, or -o another file"
        ) from error
