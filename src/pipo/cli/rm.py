"""`pipo rm`: remove a model that was pulled."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.base.errors import Cancelled, UsageError
from pipo.cli.flags import JsonFlag, OutputFlags

if TYPE_CHECKING:
    from pipo.store.removal import Removal


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `pipo list`; org/name for all of it.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    json: JsonFlag = False,
    *,
    output: OutputFlags,
) -> None:
    """Remove a model from pipo's folder or from the Hugging Face cache, after asking.

    Other programs share that cache: what they have of the same model goes too. Files elsewhere are never touched.
    """
    from pipo.base.units import format_size
    from pipo.cli.terminal import print_note, write_json
    from pipo.store.removal import plan_removal

    removal = plan_removal(name)
    if not yes:
        _ask(removal)
    removal.run()
    if json:
        paths = [str(path) for path in removal.paths]
        write_json({"name": removal.name, "removed": paths, "freed_bytes": removal.num_bytes})
    elif not output.quiet:
        print_note(f"{removal.name} removed, {format_size(removal.num_bytes)} freed")


def _ask(removal: Removal) -> None:
    """Raises Cancelled where the answer is not yes, UsageError where nobody can answer."""
    from pipo.base.units import format_size
    from pipo.cli.terminal import print_columns, stderr

    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("rm asks first, and there is no terminal to ask at", hint=f"pipo rm {removal.name} --yes")
    print_columns(stderr(), ("would go",), [(each,) for each in (*removal.models, *map(str, removal.paths))])
    stderr().print(f"Remove {removal.name} and free {format_size(removal.num_bytes)}? [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Cancelled("nothing was removed")
