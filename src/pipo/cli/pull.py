"""`pipo pull`: fetch a known model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.cli.flags import OutputFlags

if TYPE_CHECKING:
    from rich.progress import TaskID


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `pipo list`.")],
    *,
    output: OutputFlags,
) -> None:
    """Fetch a model into pipo's folder, and print its path.

    What was interrupted is continued; what is there and intact is not fetched again.
    """
    from pipo.cli.terminal import print_note, stderr
    from pipo.store.library import find_known
    from pipo.store.pull import pull_model

    known = find_known(name)
    if not output.quiet:
        print_note(f"{known.about} ({known.licence})")
    shows_bars = stderr().is_terminal and not output.quiet
    print(_pull_with_bars(name) if shows_bars else pull_model(name))


def _pull_with_bars(name: str) -> Path:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from pipo.cli.terminal import stderr
    from pipo.store.pull import pull_model

    columns = TextColumn("{task.description:<8}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with Progress(*columns, console=stderr()) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done_bytes: int, num_bytes: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=num_bytes)
            bars.update(tasks[what], completed=done_bytes, total=num_bytes)

        return pull_model(name, progress=advance)
