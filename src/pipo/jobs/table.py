"""What a job asks of a table, whatever kind of file it is."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipo.base.errors import MalformedTable, UsageError
from pipo.base.file_identity import FileIdentity
from pipo.jobs.answers import Answer, AnswerNames

Values = Mapping[str, object]  # of a row, by column
Row = Values | UsageError  # or why this row alone cannot be read
Create = Callable[[Path], BinaryIO]  # a file to write, or a disk that is full in tests
MAX_VALUE_BYTES = 1 << 24  # of a line or a value: 16 MiB of text are millions of tokens
_GONE_HINT = "the answers so far are kept: once it is as it was, --resume goes on"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a table has, read once before a job. `identity` tells it from every other table, for the journal."""

    columns: tuple[str, ...]  # of all rows, in order of appearance
    num_rows: int
    identity: Mapping[str, object]
    is_openai: bool = False  # lines of OpenAI's batch format


class Table(ABC):
    """Rows in order. Threads: one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def look(self) -> Contents:
        """Read it through. Raises MalformedTable naming the place, UsageError for one with nothing in it."""

    @abstractmethod
    def rows(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        """Each with these columns at least; None: all of them. Raises MalformedTable."""

    @abstractmethod
    def write(self, part: Path, answers: Iterator[Answer], contents: Contents, form: OutputForm) -> None:
        """The first rows with their answers, as many as there are answers, to a new file or folder.

        Raises MalformedTable, and OSError where it cannot be written.
        """

    def version(self) -> object:
        """What changes when the table does. Raises MalformedTable where it is gone."""
        try:
            return FileIdentity.of(self.path.stat())
        except OSError as error:
            raise read_failed(self.path, error) from error

    def taken_names(self, contents: Contents, names: AnswerNames) -> list[str]:
        """Columns that are there already under the names of new ones."""
        return [name for name in names.all if name in contents.columns]


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How answers are written: the new columns' names, and for OpenAI's lines the model's."""

    names: AnswerNames
    model: str
    create: Create


class Lines:
    """The lines of a UTF-8 text, each without its end, and what tells the file from another.

    `number` is the line that was read last, from 1. Raises MalformedTable naming the line.
    """

    def __init__(self, path: Path, *, keep_ends: bool = False) -> None:
        self.number = 0
        self.num_bytes = 0
        self.has_mark = False  # a byte order mark, as spreadsheets write it
        self.ends_in_crlf = False  # the first line
        self._path = path
        self._keeps_ends = keep_ends
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def identity(self) -> dict[str, object]:
        """Of what was read so far."""
        return {"name": self._path.name, "num_bytes": self.num_bytes, "blake2b": self._digest.hexdigest()}

    def __iter__(self) -> Iterator[str]:
        try:
            with self._path.open("rb") as stream:
                while data := stream.readline(MAX_VALUE_BYTES + 1):
                    yield self._text(data)
        except OSError as error:
            raise read_failed(self._path, error) from error

    def failed(self, wanted: str, found: object) -> MalformedTable:
        return MalformedTable(f"{self._path}: line {self.number}: wanted {wanted}, found {found!s:.200}")

    def _text(self, data: bytes) -> str:
        self.number += 1
        self.num_bytes += len(data)
        self._digest.update(data)
        if len(data) > MAX_VALUE_BYTES:
            raise self.failed(f"at most {MAX_VALUE_BYTES} bytes", "more")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise self.failed("UTF-8", f"byte {error.start} of the line, 0x{data[error.start]:02X}") from error
        if self.number == 1:
            self.has_mark, self.ends_in_crlf = text.startswith("\ufeff"), text.endswith("\r\n")
            text = text.removeprefix("\ufeff")
        return text if self._keeps_ends else text.rstrip("\r\n")


def read_failed(path: Path, error: OSError) -> MalformedTable:
    return MalformedTable(f"cannot read {path}: {error.strerror or error}", hint=_GONE_HINT)


def changed(path: Path) -> MalformedTable:
    return MalformedTable(f"{path} is not what it was when the job began", hint=_GONE_HINT)


def create_file(path: Path) -> BinaryIO:
    """A `Create` on a real disk."""
    return path.open("wb")


def sync_and_close(stream: BinaryIO) -> None:
    """What was written is on the disk."""
    stream.flush()
    if hasattr(stream, "fileno"):
        os.fsync(stream.fileno())
    stream.close()
