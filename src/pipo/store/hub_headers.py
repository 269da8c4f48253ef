"""Of a model of the hub the headers alone, by requests for ranges: enough to plan with, before anything is pulled.

What came is not compared with a hash, as a part has none; the readers of headers take nothing on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipo.base.errors import MalformedFile, ModelError
from pipo.base.units import KIB, MIB, format_size
from pipo.formats.gguf import has_whole_header
from pipo.formats.gguf_header import MAX_HEADER_BYTES
from pipo.formats.json_object import MAX_VALUES, parse_object
from pipo.formats.safetensors import MAX_HEADER_BYTES as MAX_SAFETENSORS_HEADER_BYTES
from pipo.store.fetch import Destination, download
from pipo.store.hub import Hub, HubFile, HubRepo
from pipo.store.hub_files import INDEX, check_index_size, safetensors_set
from pipo.store.hub_name import HubName
from pipo.store.hub_pull import gguf_files
from pipo.store.ranges import read_range
from pipo.store.request import NoAccess

FIRST_GGUF_BYTES = 2 * MIB  # a vocabulary of 49k takes 1.8 MB, one of 128k 8 MB, one of 262k 16 MB
FIRST_SHARD_BYTES = 256 * KIB  # of later shards, which have no vocabulary; and of safetensors
_LENGTH_BYTES = 8

Report = Callable[[int], None]  # bytes that came so far


@dataclass(frozen=True, slots=True)
class Headers:
    """What was fetched. `path` opens with `header_only`; `num_bytes` of `model_bytes` came."""

    path: Path
    name: HubName
    num_bytes: int
    model_bytes: int


def fetch_headers(name: HubName, folder: Path, report: Report = lambda num_bytes: None) -> Headers:
    """Bring the headers into `folder`, under the files' own names.

    Raises: ModelNotFound, UnsupportedModel, MalformedFile, DownloadError.
    """
    repo = Hub.from_environment().look_up(name.repo)
    files = gguf_files(repo, name)
    if files:
        return fetch_gguf_headers(repo, files, name, folder, report)
    return fetch_safetensors_headers(repo, name, folder, report)


def fetch_gguf_headers(
    repo: HubRepo, files: list[HubFile], name: HubName, folder: Path, report: Report = lambda num_bytes: None
) -> Headers:
    """As many bytes of each shard as its header takes: asked for again, twice as many, until it is whole."""
    done_bytes = 0
    for idx, file in enumerate(files):
        path = folder / PurePosixPath(file.path).name
        part = _Beginning(repo, file, path)
        try:
            part.grow(FIRST_SHARD_BYTES if idx else FIRST_GGUF_BYTES)
            report(done_bytes + part.num_bytes)
            while not has_whole_header(path):
                part.grow(2 * part.num_bytes)
                report(done_bytes + part.num_bytes)
        except ModelError as error:
            error.message = error.message.replace(str(path), f"{repo.repo}/{file.path}")
            raise
        done_bytes += part.num_bytes
    first = folder / PurePosixPath(files[0].path).name
    return Headers(first, name, done_bytes, sum(file.num_bytes for file in files))


def fetch_safetensors_headers(
    repo: HubRepo, name: HubName, folder: Path, report: Report = lambda num_bytes: None
) -> Headers:
    """Config and tokenizer whole, and of each file of weights the length and the JSON behind it."""
    index = next((file for file in repo.files if file.path == INDEX), None)
    names = None
    if index is not None:
        check_index_size(index)
        _fetch_whole(repo, index, folder)
        names = (folder / INDEX).read_bytes()
    wanted = {file.path for file in safetensors_set(repo.files, names)}
    files, done_bytes = [file for file in repo.files if file.path in wanted], 0
    for file in files:
        path = folder / file.path
        if not file.path.endswith(".safetensors"):
            if not path.exists():
                _fetch_whole(repo, file, folder)
            done_bytes += file.num_bytes
        else:
            done_bytes += _fetch_safetensors_header(_Beginning(repo, file, path))
        report(done_bytes)
    return Headers(folder, name, done_bytes, sum(file.num_bytes for file in files))


def _fetch_safetensors_header(part: _Beginning) -> int:
    part.grow(FIRST_SHARD_BYTES)
    head = part.path.read_bytes()
    num_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    end, shown = _LENGTH_BYTES + num_bytes, f"{part.repo.repo}/{part.file.path}"
    if len(head) < _LENGTH_BYTES or num_bytes > MAX_SAFETENSORS_HEADER_BYTES or end > part.file.num_bytes:
        raise MalformedFile(
            f"{shown}: claims a header of {num_bytes} bytes, the file has {part.file.num_bytes} and a header may have "
            f"{MAX_SAFETENSORS_HEADER_BYTES}"
        )
    if end > part.num_bytes:
        part.grow(end)
    with part.path.open("r+b") as file:
        file.truncate(end)
        file.seek(_LENGTH_BYTES)
        try:
            parse_object(file.read(), MAX_VALUES)
        except ValueError as error:
            raise MalformedFile(f"{shown}: its header {error}") from None
    return part.num_bytes


def _fetch_whole(repo: HubRepo, file: HubFile, folder: Path) -> None:
    try:
        download(repo.address_of(file), Destination(folder / file.path, variable="HF_HOME"), file.expected)
    except NoAccess as error:
        raise repo.explain(error) from error


@dataclass(slots=True)
class _Beginning:
    """The first bytes of a file of the hub, in a file here."""

    repo: HubRepo
    file: HubFile
    path: Path
    num_bytes: int = 0

    def grow(self, num_bytes: int) -> None:
        """Have `num_bytes`, or all there are. Raises DownloadError where there are no more to ask for."""
        num_bytes = min(num_bytes, self.file.num_bytes, MAX_HEADER_BYTES)
        if num_bytes <= self.num_bytes:
            came, whole = format_size(self.num_bytes), format_size(self.file.num_bytes)
            raise MalformedFile(f"{self.repo.repo}/{self.file.path}: {came} of {whole} hold no whole header")
        address = self.repo.address_of(self.file)
        try:
            data = read_range(address, self.num_bytes, num_bytes, self.file.num_bytes)
        except NoAccess as error:
            raise self.repo.explain(error) from error
        with self.path.open("ab" if self.num_bytes else "wb") as out:
            out.write(data)
        self.num_bytes = num_bytes
