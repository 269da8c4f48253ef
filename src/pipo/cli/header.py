"""A model's header for a plan: from a file, or of a model of the hub that is not here from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipo.base.errors import PipoError
from pipo.base.folders import cache_folder
from pipo.base.units import format_size
from pipo.cli.flags import OutputFlags
from pipo.cli.session import open_model
from pipo.cli.terminal import print_note, stderr
from pipo.model_file import ModelFile
from pipo.store.hub_cache import NotPulled, hub_cache_folder
from pipo.store.hub_name import HubName


@dataclass(frozen=True, slots=True)
class Opened:
    """`shown` is the model's path, or its name on the hub."""

    model: ModelFile
    shown: str


@contextmanager
def opened_header(name: str, output: OutputFlags) -> Iterator[Opened]:
    """Raises ModelError, DownloadError."""
    try:
        model = open_model(name, None, header_only=True)
    except NotPulled as error:
        missing = error.name
    else:
        yield Opened(model, str(model.path))
        return
    with TemporaryDirectory(prefix=".pipo-header-", dir=_place()) as outer:
        folder = Path(outer, missing.repo.partition("/")[2])  # the last part of a path may be all that a file says
        folder.mkdir()
        with _naming(missing, folder):
            yield Opened(_fetch(missing, folder, output), str(missing))


@contextmanager
def _naming(name: HubName, folder: Path) -> Iterator[None]:
    """Errors are of the model, not of the place that its header has for a moment."""
    try:
        yield
    except PipoError as error:
        error.message = error.message.replace(str(folder), name.repo)
        raise


def _fetch(name: HubName, folder: Path, output: OutputFlags) -> ModelFile:
    from pipo.store.hub_headers import fetch_headers

    if output.quiet or not stderr().is_terminal:
        headers = fetch_headers(name, folder)
    else:
        with stderr().status("asking the hub …", spinner_style="dim") as status:
            headers = fetch_headers(
                name, folder, lambda num_bytes: status.update(f"reading the header: {format_size(num_bytes)} …")
            )
    if not output.quiet:
        came, whole = format_size(headers.num_bytes), format_size(headers.model_bytes)
        print_note(f"{name} is not here: {came} of its {whole} were read from the hub")
    return ModelFile(headers.path, header_only=True)


def _place() -> Path:
    """On the drive that the model would be pulled to, where there is one: what was measured of it is looked up."""
    own, cache = cache_folder(), hub_cache_folder()
    own.mkdir(parents=True, exist_ok=True)
    if not cache.is_dir() or cache.stat().st_dev == own.stat().st_dev:
        return own
    return cache
