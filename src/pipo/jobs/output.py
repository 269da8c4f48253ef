"""The output: written in order from the table and the journal beside its place, then given its name at once."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from pipo.base.errors import MalformedTable, UsageError
from pipo.jobs.journal import Journal, cannot_write
from pipo.jobs.table import Contents, OutputForm, Table, changed
from pipo.jobs.tables import kind_of, named_kind
from pipo.jobs.text_folder import ACCOUNTS
from pipo.packing.part import sync_folder


def check_output(table: Path, output: Path, *, is_resumed: bool, is_overwritten: bool) -> None:
    """Raises UsageError where the output cannot have this place, before anything is computed."""
    kind = kind_of(table)
    if (named_kind(output) or "folder") != kind:
        wanted = "a folder" if kind == "folder" else f"a {kind} file, as {table.name} is one"
        raise UsageError(f"-o {output}: the output is of the same kind as the input", hint=f"name {wanted}")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.absolute().parent}")
    inside = table.resolve()
    if output.resolve() == inside or (kind == "folder" and inside in output.resolve().parents):
        raise UsageError(f"-o {output}: the output would be part of the input", hint="name another place")
    if not output.exists():
        return
    if not (is_resumed or is_overwritten):
        raise UsageError(f"-o {output} is already there", hint="--overwrite replaces it, --resume goes on with a job")
    if output.is_dir() != (kind == "folder"):
        raise UsageError(f"-o {output} is already there, and is {'a folder' if output.is_dir() else 'a file'}")
    if output.is_dir() and any(output.iterdir()) and not (output / ACCOUNTS).is_file():
        raise UsageError(f"-o {output} is a folder that no job has made: it has no {ACCOUNTS}", hint="name another")


def publish(
    table: Table, version: object, contents: Contents, journal: Journal, num_rows: int, output: Path, form: OutputForm
) -> None:
    """Whoever looks at its place sees what was there before, or the whole of it.

    Raises MalformedTable where the table is not what it was, OutputFailed; then the journal still has every answer.
    """
    part = output.with_name(f"{output.name}.part")
    if table.version() != version:
        raise changed(table.path)
    try:
        _remove(part)
        table.write(part, journal.in_order(num_rows), contents, form)
        if table.version() != version:
            raise changed(table.path)
        _give_name(part, output)
        sync_folder(output.absolute().parent)
    except OSError as error:
        _remove_quietly(part)  # on a full disk it would only be in the way
        raise cannot_write(part, error) from error
    except MalformedTable:
        _remove_quietly(part)
        raise


def _give_name(part: Path, output: Path) -> None:
    """A folder that is replaced is out of its place for a moment."""
    if not (part.is_dir() and output.exists()):
        part.replace(output)
        return
    old = output.with_name(f"{output.name}.old")
    _remove(old)
    output.rename(old)
    part.rename(output)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_quietly(path: Path) -> None:
    with suppress(OSError):
        _remove(path)
