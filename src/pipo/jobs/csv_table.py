"""Comma-separated values with a header, in UTF-8; tab-separated ones where the file is called `.tsv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipo.base.errors import UsageError
from pipo.jobs.answers import Answer
from pipo.jobs.table import MAX_VALUE_BYTES, Contents, Lines, OutputForm, Row, Table, sync_and_close


class CsvTable(Table):
    def look(self) -> Contents:
        lines = Lines(self.path, keep_ends=True)
        records = self._records(lines)
        header = _checked(next(records, []), lines)
        num_rows = sum(1 for _ in records)
        if not num_rows:
            raise UsageError(f"{self.path}: has a header and no rows")
        return Contents(tuple(header), num_rows, {"kind": "csv", **lines.identity})

    def rows(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        records = self._records(Lines(self.path, keep_ends=True))
        header = next(records, [])
        return (dict(zip(header, record, strict=True)) for record in records)

    def write(self, part: Path, answers: Iterator[Answer], contents: Contents, form: OutputForm) -> None:
        lines = Lines(self.path, keep_ends=True)
        records = self._records(lines)
        header = next(records, [])
        stream = form.create(part)
        try:
            text = io.TextIOWrapper(stream, "utf-8", errors="replace", newline="", write_through=True)
            text.write("\ufeff" if lines.has_mark else "")
            writer = csv.writer(text, delimiter=self._delimiter, lineterminator="\r\n" if lines.ends_in_crlf else "\n")
            writer.writerow([*header, *form.names.all])
            for answer, record in zip(answers, records, strict=False):
                writer.writerow([*record, *form.names.values(answer).values()])
            text.detach()
            sync_and_close(stream)
        finally:
            stream.close()

    @property
    def _delimiter(self) -> str:
        return "\t" if self.path.suffix.lower() == ".tsv" else ","

    def _records(self, lines: Lines) -> Iterator[list[str]]:
        """Header and rows, all of one length. Empty lines are no rows."""
        csv.field_size_limit(MAX_VALUE_BYTES)
        reader: Any = csv.reader(lines, delimiter=self._delimiter, strict=True)
        width = 0
        try:
            for record in reader:
                if not record:
                    continue
                width = width or len(record)
                if len(record) != width:
                    raise lines.failed(f"{width} values, as the header has", f"{len(record)}: {record}")
                yield record
        except csv.Error as error:
            raise lines.failed("comma-separated values", str(error)) from error


def _checked(header: list[str], lines: Lines) -> list[str]:
    lines.number = max(lines.number, 1)
    if not header:
        raise lines.failed("a header that names the columns", "nothing")
    if not all(name.strip() for name in header):
        raise lines.failed("a header that names every column", header)
    if len(set(header)) != len(header):
        raise lines.failed("a header that names each column once", header)
    return header
