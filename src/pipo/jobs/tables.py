"""Which kind of table a path is."""

from __future__ import annotations

from pathlib import Path

from pipo.base.errors import UsageError
from pipo.jobs.table import Table

_KINDS = ".jsonl, .ndjson, .csv, .tsv, .parquet, or a folder of text files"


def open_table(path: Path) -> Table:
    """By its name; nothing is read. Raises UsageError for what is not there or of no such kind."""
    kind = kind_of(path)
    if kind == "folder":
        from pipo.jobs.text_folder import TextFolder

        return TextFolder(path)
    if kind == "jsonl":
        from pipo.jobs.jsonl_table import JsonlTable

        return JsonlTable(path)
    if kind == "csv":
        from pipo.jobs.csv_table import CsvTable

        return CsvTable(path)
    from pipo.jobs.parquet_table import ParquetTable

    return ParquetTable(path)


def kind_of(path: Path) -> str:
    """Raises UsageError for what is not there, or is no table."""
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder", hint=f"a table of rows: {_KINDS}")
    kind = "folder" if path.is_dir() else named_kind(path)
    if kind is None or not (path.is_dir() or path.is_file()):
        raise UsageError(f"{path}: is no table that can be read", hint=f"wanted {_KINDS}")
    return kind


def named_kind(path: Path) -> str | None:
    """What a file of this name would be; None where the name does not say."""
    return _SUFFIXES.get(path.suffix.lower())


_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
