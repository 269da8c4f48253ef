"""Parquet files, in batches of rows: a page of each column is in memory at a time, whatever the size of row groups.

pyarrow is an extra, `pipo[parquet]`, and is imported where a table of this kind is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from pipo.base.errors import MalformedTable, UsageError
from pipo.jobs.answers import Answer, AnswerNames
from pipo.jobs.table import Contents, OutputForm, Row, Table, read_failed, sync_and_close

BATCH_ROWS = 256  # 40 MiB of the process with rows of 3 KB, library included
_ROW_GROUP_BYTES = 4 << 20  # of the output; one for every batch would have a footer that grows into a table itself
_BUFFER_BYTES = 1 << 20  # of each column that is read
_TAIL_BYTES = 8  # the length of the footer, and PAR1


class ParquetTable(Table):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._pa, self._pq = _library(path)

    def look(self) -> Contents:
        with self._opened() as file:
            names = tuple(file.schema_arrow.names)
            if len(set(names)) != len(names):
                raise MalformedTable(
                    f"{self.path}: wanted columns with names of their own, found {', '.join(names):.200}"
                )
            if not file.metadata.num_rows:
                raise UsageError(f"{self.path}: has no rows")
            return Contents(names, file.metadata.num_rows, self._identity())

    def rows(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        with self._opened() as file:
            wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            if wanted == []:  # rows that nothing is read of are rows all the same
                yield from ({} for _ in range(file.metadata.num_rows))
                return
            for batch in self._batches(file, wanted):
                yield from batch.to_pylist()

    def write(self, part: Path, answers: Iterator[Answer], contents: Contents, form: OutputForm) -> None:
        pa = self._pa
        with self._opened() as file:
            added = _schema(pa, form.names)
            schema = pa.schema([*file.schema_arrow, *added], metadata=file.schema_arrow.metadata)
            stream = form.create(part)
            try:
                with self._pq.ParquetWriter(pa.PythonFile(stream, mode="w"), schema, compression="zstd") as writer:
                    for group in _grouped(self._answered(file, answers, schema, form.names)):
                        writer.write_table(pa.Table.from_batches(group))
                        pa.default_memory_pool().release_unused()  # 126 MB for 240 MB of table, without it 154
                sync_and_close(stream)
            finally:
                stream.close()

    def _answered(self, file: Any, answers: Iterator[Answer], schema: Any, names: AnswerNames) -> Iterator[Any]:
        """Batches of the file with the new columns behind its own."""
        for batch in self._batches(file, None):
            found = [names.values(answer) for answer in islice(answers, batch.num_rows)]
            types = [schema.field(name).type for name in names.all]
            new = [
                self._pa.array([row[name] for row in found], kind) for name, kind in zip(names.all, types, strict=True)
            ]
            if found:
                yield self._pa.record_batch([*batch.slice(0, len(found)).columns, *new], schema=schema)
            if len(found) < batch.num_rows:
                return

    def _batches(self, file: Any, columns: list[str] | None) -> Iterator[Any]:
        with self._named_errors():
            batches = file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)
        wanted, num_rows = file.metadata.num_rows, 0
        while True:
            with self._named_errors():
                batch = next(batches, None)
            if batch is None:
                break
            num_rows += batch.num_rows
            yield batch
        if num_rows != wanted:
            raise MalformedTable(f"{self.path} is not a sound Parquet file: wanted {wanted} rows, found {num_rows}")

    def _identity(self) -> dict[str, object]:
        """Its size, when it was written, and its footer, which says where everything lies."""
        status = self.path.stat()
        with self.path.open("rb") as stream:
            stream.seek(-_TAIL_BYTES, 2)
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(-_TAIL_BYTES - length, 2)
            digest = hashlib.blake2b(stream.read(length), digest_size=16).hexdigest()
        known = {"name": self.path.name, "num_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        return {"kind": "parquet", **known, "blake2b": digest}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with self._named_errors():
            file = self._pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        with file:
            yield file

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """What the library raises for a broken file: its own errors, and OSError for what it cannot decode."""
        try:
            yield
        except FileNotFoundError as error:
            raise read_failed(self.path, error) from error
        except (self._pa.ArrowException, OSError, ValueError) as error:
            raise MalformedTable(f"{self.path} is not a sound Parquet file: {error!s:.200}") from error


def _library(path: Path) -> tuple[ModuleType, ModuleType]:
    """With its own memory pool and threads kept out of the way."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: Parquet needs pyarrow, which is not here", hint="pip install 'pipo[parquet]'"
        ) from error
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    return pyarrow, pyarrow.parquet


def _grouped(batches: Iterator[Any]) -> Iterator[list[Any]]:
    """As many side by side as make a row group."""
    group, num_bytes = list[Any](), 0
    for batch in batches:
        group.append(batch)
        num_bytes += batch.nbytes
        if num_bytes >= _ROW_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _schema(pa: Any, names: AnswerNames) -> Any:
    text, number = pa.string(), pa.int64()
    return pa.schema(list(zip(names.all, (text, text, number, number, text), strict=True)))
