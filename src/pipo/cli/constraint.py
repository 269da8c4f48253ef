"""The flags that say what an answer must look like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipo.base.errors import UsageError
from pipo.generation.request import ConstraintKind, ConstraintSpec

_PANEL = "Constraint"
_MOST_BYTES = 1 << 20  # read of a file; what is too long to follow is said later


@dataclass(frozen=True, slots=True)
class ConstraintFlags:
    """One of them at most."""

    json_schema: Annotated[
        str | None,
        typer.Option(
            "-j",
            "--json-schema",
            metavar="FILE|TEXT",
            help="The answer is JSON that is valid by this schema; '{}' takes any.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The answer follows this Lark grammar.", rich_help_panel=_PANEL),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The whole answer matches this regex.", rich_help_panel=_PANEL),
    ] = None

    def spec(self) -> ConstraintSpec | None:
        """None where there is none. Raises UsageError for two of them, and for a file that cannot be read."""
        given = {
            "--json-schema": self.json_schema,
            "--grammar": self.grammar,
            "--regex": self.regex,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise UsageError(f"{names[0]} and {names[1]} contradict each other", hint="leave one of them out")
        if self.json_schema is not None:
            return ConstraintSpec(ConstraintKind.JSON_SCHEMA, _schema(self.json_schema))
        if self.grammar is not None:
            return ConstraintSpec(ConstraintKind.GRAMMAR, _read("--grammar", self.grammar))
        return None if self.regex is None else ConstraintSpec(ConstraintKind.REGEX, self.regex)


def _schema(value: str) -> str:
    """The text of a schema is an object; a file is not named like one."""
    if value.lstrip().startswith("{") or value in ("true", "false"):
        return value
    return _read("--json-schema", Path(value))


def _read(flag: str, path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{flag} {path}: has more than {_MOST_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path}: not UTF-8 text: byte {error.start} is 0x{data[error.start]:02X}") from error
