"""A folder of text files: one row each, in the order of their names, sub-folders included.

Answers become files of the same names in another folder, beside `accounts.jsonl`. Hidden files are no rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from pipo.base.errors import UsageError
from pipo.jobs.answers import Answer
from pipo.jobs.table import MAX_VALUE_BYTES, Contents, OutputForm, Row, Table, changed, read_failed, sync_and_close

FILE, TEXT = "file", "text"  # columns
ACCOUNTS = "accounts.jsonl"


class TextFolder(Table):
    def look(self) -> Contents:
        names = self._names()
        if not names:
            raise UsageError(f"{self.path}: has no files", hint="a folder of text files, one for each row")
        if ACCOUNTS in names:
            raise UsageError(f"{self.path} has a file {ACCOUNTS}, which is what the output's accounts are called")
        return Contents(
            (FILE, TEXT), len(names), {"kind": "folder", "name": self.path.name, "blake2b": self._digest(names)}
        )

    def rows(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        return (self._row(name) for name in self._names())

    def write(self, part: Path, answers: Iterator[Answer], contents: Contents, form: OutputForm) -> None:
        part.mkdir()
        accounts = form.create(part / ACCOUNTS)
        try:
            for answer, name in zip(answers, self._names(), strict=False):
                if answer.text is not None:
                    self._write_text(part / name, answer.text, form)
                values = form.names.values(answer)
                del values[form.names.answer]
                accounts.write(json.dumps({FILE: name, **values}).encode() + b"\n")
            sync_and_close(accounts)
        finally:
            accounts.close()

    def version(self) -> object:
        """Of all files: each is read by itself."""
        return self._digest(self._names())

    def taken_names(self, contents: Contents, names: object) -> list[str]:
        return []

    def _write_text(self, path: Path, text: str, form: OutputForm) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = form.create(path)
        try:
            stream.write(text.encode("utf-8", "replace"))
            sync_and_close(stream)
        finally:
            stream.close()

    def _row(self, name: str) -> Row:
        path = self.path / name
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_VALUE_BYTES + 1)
        except OSError as error:
            raise read_failed(path, error) from error
        if len(data) > MAX_VALUE_BYTES:
            return UsageError(f"{name}: more than {MAX_VALUE_BYTES} bytes of text")
        try:
            return {FILE: name, TEXT: data.decode()}
        except UnicodeDecodeError as error:
            return UsageError(f"{name}: is not UTF-8, byte {error.start} is 0x{data[error.start]:02X}")

    def _names(self) -> list[str]:
        """Relative to the folder, in order, with / between."""
        found: list[str] = []
        for folder, folders, files in os.walk(self.path, onerror=self._fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(folder).relative_to(self.path)
            found += [(inside / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def _fail(self, error: OSError) -> None:
        raise read_failed(self.path, error) from error

    def _digest(self, names: list[str]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            try:
                status = (self.path / name).stat()
            except OSError as error:
                raise changed(self.path / name) from error
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
