"""`pipo pull`: fetch a model, a known one or one of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from pipo.cli.flags import JsonFlag, OutputFlags

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pipo.store.fetch import Progress
    from pipo.store.hub_files import RepoFile
    from pipo.store.hub_name import HubName


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="org/name[:quant] of the hub, or a name from `pipo list`.")
    ],
    json: JsonFlag = False,
    *,
    output: OutputFlags,
) -> None:
    """Fetch a model, unless it is there, and print its path.

    What was interrupted is continued; what is there and intact is not fetched again. Models of the Hugging Face hub go
    into its own cache, which other programs share.
    """
    from pipo.store.hub_name import HubName

    hub_name = HubName.parse(name)
    if hub_name is None:
        _pull_known(name, json, output)
    else:
        _pull_from_hub(hub_name, json, output)


def _pull_known(name: str, json: bool, output: OutputFlags) -> None:
    from pipo.cli.terminal import print_note, write_json
    from pipo.store.library import find_known
    from pipo.store.pull import pull_model

    known = find_known(name)
    if not output.quiet:
        print_note(f"{known.about} ({known.licence})")
    with _bars(output) as progress:
        path = pull_model(name, progress=progress)
    if json:
        write_json({"name": known.name, "path": str(path), "bytes": known.expected.num_bytes})
    else:
        print(path)


def _pull_from_hub(name: HubName, json: bool, output: OutputFlags) -> None:
    from pipo.base.units import format_size
    from pipo.cli.terminal import print_note, write_json
    from pipo.store.hub_pull import pull_from_hub

    def announce(files: Sequence[RepoFile]) -> None:
        """What was chosen, before hours of fetching it."""
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        size = format_size(sum(file.num_bytes for file in files))
        if not output.quiet:
            print_note(f"{name}: {files[0].path}{more}, {size}")

    with _bars(output) as progress:
        pulled = pull_from_hub(name, progress=progress, announce=announce)
    model = pulled.model
    if not output.quiet:
        came = f"{format_size(pulled.fetched_bytes)} fetched" if pulled.fetched_bytes else "was there"
        print_note(f"{model.name} · {format_size(model.num_bytes)} · {came}")
    if json:
        files = [str(path) for path in model.files]
        sizes = {"bytes": model.num_bytes, "fetched_bytes": pulled.fetched_bytes}
        write_json(
            {"name": str(model.name), "path": str(model.path), "revision": model.revision, "files": files} | sizes
        )
    else:
        print(model.path)


@contextmanager
def _bars(output: OutputFlags) -> Iterator[Progress]:
    """How far each thing is that takes long, on a terminal."""
    from pipo.cli.bars import byte_progress
    from pipo.cli.terminal import stderr

    if output.quiet or not stderr().is_terminal:
        yield lambda what, done_bytes, num_bytes: None
        return
    with byte_progress("{task.description:<8}", is_transient=False) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done_bytes: int, num_bytes: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=num_bytes)
            bars.update(tasks[what], completed=done_bytes, total=num_bytes)

        yield advance
