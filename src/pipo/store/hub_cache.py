"""The Hugging Face cache on this machine: which models lie there, and where. Asks no network.

    models--org--name/blobs/HASH              what was fetched, by the hash of its bytes
    models--org--name/snapshots/COMMIT/FILE   a link to it, under the name it has in the repository
    models--org--name/refs/main               the commit that the hub had last

Other programs share the folder and write to it: a link is followed only where it stays in the cache. Imports neither
huggingface-hub nor anything else that costs memory: every start asks here.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipo.base.errors import MalformedFile, ModelError, ModelNotFound, UsageError
from pipo.store.hub_files import (
    INDEX,
    MAX_INDEX_BYTES,
    RepoFile,
    Variant,
    choose_variant,
    has_safetensors,
    safetensors_set,
    variants_of,
)
from pipo.store.hub_name import HubName, is_repo

COMMIT = re.compile(r"[0-9a-f]{40}")
PART_SUFFIX = ".incomplete"  # what other programs that share the cache know as unfinished
_PREFIX = "models--"
_NOT_HERE = "is not on this machine: there is no such file, and it was not pulled from the hub"
_MAX_REF_BYTES = 200


class NotPulled(ModelNotFound):
    """A model of the hub that is not on this machine, or not whole."""

    def __init__(self, name: HubName, what: str) -> None:
        super().__init__(f"{name} {what}", hint=f"pipo pull {name}")
        self.name = name


class OutsideCache(ModelError):
    """A link in the cache that leads out of it."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that can be opened. `path` is a GGUF file, the first of its shards, or a folder of safetensors."""

    name: HubName
    path: Path
    files: tuple[Path, ...]
    num_bytes: int
    revision: str


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository's folder in the cache; may be empty, half fetched or damaged."""

    cache: Path
    repo: str
    folder: Path

    def snapshots(self) -> list[Path]:
        """The main one first, then the newest."""
        try:
            there = list((self.folder / "snapshots").iterdir())
        except OSError:
            return []
        main, found = self._main(), []
        for path in there:
            with suppress(OSError):  # it has gone meanwhile
                if COMMIT.fullmatch(path.name):
                    found.append((path.name == main, path.lstat().st_mtime, path))
        return [path for _, _, path in sorted(found, reverse=True)]

    def _main(self) -> str:
        try:
            with (self.folder / "refs" / "main").open("rb") as file:
                return file.read(_MAX_REF_BYTES).decode(errors="replace").strip()
        except OSError:
            return ""

    def unfinished(self) -> list[Path]:
        """Parts of files that a download left when it was interrupted."""
        return sorted((self.folder / "blobs").glob(f"*{PART_SUFFIX}"))

    def unfinished_bytes(self) -> int:
        num_bytes = 0
        for path in self.unfinished():
            with suppress(OSError):  # the download has ended meanwhile
                num_bytes += path.stat().st_size
        return num_bytes

    def models(self) -> Iterator[CachedModel]:
        """Whole ones, each once: of several snapshots the first that has it. Raises OutsideCache."""
        seen = set()
        for snapshot in self.snapshots():
            for model in self._models_in(snapshot):
                if model.name not in seen:
                    seen.add(model.name)
                    yield model

    def _models_in(self, snapshot: Path) -> Iterator[CachedModel]:
        files = files_in(snapshot)
        variants = [variant for variant in variants_of(files) if variant.is_complete]
        labels = [variant.label for variant in variants]
        for variant in variants:
            is_clear = labels.count(variant.label) == 1
            yield self._model_of(snapshot, variant, variant.label if is_clear else PurePosixPath(variant.stem).name)
        folder = self._folder_of(snapshot, files)
        if folder is not None:
            yield folder

    def find(self, name: HubName) -> CachedModel:
        """As `pipo pull` would choose, of what is here. Raises NotPulled, OutsideCache, ModelNotFound (several fit)."""
        incomplete: list[Variant] = []
        for snapshot in self.snapshots():
            files = files_in(snapshot)
            variants = variants_of(files)
            whole = [variant for variant in variants if variant.is_complete]
            incomplete += [variant for variant in variants if not variant.is_complete]
            if name.quant is not None:
                whole = [v for v in whole if v.is_called(name.quant) or v.has_word(name.quant)]
            if whole:
                chosen = choose_variant(whole, name)
                return self._model_of(snapshot, chosen, chosen.label)
            folder = self._folder_of(snapshot, files) if name.quant is None else None
            if folder is not None:
                return folder
        if name.quant is not None:
            incomplete = [v for v in incomplete if v.is_called(name.quant) or v.has_word(name.quant)]
        if incomplete:
            num_shards = incomplete[0].num_shards
            raise NotPulled(name, f"is not whole: {len(incomplete[0].files)} of its {num_shards} shards are here")
        raise NotPulled(name, _NOT_HERE)

    def _model_of(self, snapshot: Path, variant: Variant, quant: str) -> CachedModel:
        return self._made(HubName(self.repo, quant), snapshot, variant.files, None)

    def _folder_of(self, snapshot: Path, files: list[RepoFile]) -> CachedModel | None:
        if not has_safetensors(files):
            return None
        paths = {file.path for file in files}
        try:
            index = self._read_index(snapshot) if INDEX in paths else None
            needed = safetensors_set(files, index)
        except (ModelNotFound, MalformedFile):  # a shard is missing: the download has not ended
            return None
        return self._made(HubName(self.repo), snapshot, needed, snapshot)

    def _read_index(self, snapshot: Path) -> bytes:
        path = snapshot / INDEX
        check_inside(path, self.cache)
        with path.open("rb") as file:
            return file.read(MAX_INDEX_BYTES)

    def _made(
        self, name: HubName, snapshot: Path, files: list[RepoFile] | tuple[RepoFile, ...], folder: Path | None
    ) -> CachedModel:
        paths = tuple(snapshot / file.path for file in files)
        for path in paths:
            check_inside(path, self.cache)
        return CachedModel(name, folder or paths[0], paths, sum(file.num_bytes for file in files), snapshot.name)


def hub_cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface-hub keeps what it fetched: the variables are its own. May not exist. Raises UsageError."""
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    folder = environment.get("HF_HOME") or f"{home}/huggingface"
    named = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{folder}/hub"
    try:
        return Path(os.path.expandvars(named)).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError("this user has no home folder", hint="set HOME, or HF_HOME to a full path") from error


def repo_folder(cache: Path, repo: str) -> Path:
    return cache / (_PREFIX + repo.replace("/", "--"))


def find_repo(repo: str, cache: Path | None = None) -> CachedRepo | None:
    """The folder of a repository, whatever the case of its name. None: there is none."""
    cache = cache or hub_cache_folder()
    exact = repo_folder(cache, repo)
    if exact.is_dir():
        return CachedRepo(cache, repo, exact)
    alike = (found for found in cached_repos(cache) if found.repo.casefold() == repo.casefold())
    return next(alike, None)


def cached_repos(cache: Path | None = None) -> list[CachedRepo]:
    """All that have a folder, by name; nothing is said of what is in them."""
    cache = cache or hub_cache_folder()
    try:
        folders = sorted(path for path in cache.iterdir() if path.name.startswith(_PREFIX) and path.is_dir())
    except OSError:
        return []
    named = [(folder.name.removeprefix(_PREFIX).replace("--", "/"), folder) for folder in folders]
    return [CachedRepo(cache, repo, folder) for repo, folder in named if is_repo(repo)]


def find_model(name: HubName) -> CachedModel:
    """Raises NotPulled, OutsideCache, ModelNotFound where several fit."""
    repo = find_repo(name.repo)
    if repo is None:
        raise NotPulled(name, _NOT_HERE)
    return repo.find(name)


def files_in(snapshot: Path) -> list[RepoFile]:
    """The files of a snapshot that are there: a link to nothing is none. Follows no link to a folder."""
    found = []
    for folder, _, names in os.walk(snapshot):
        for name in names:
            path = Path(folder, name)
            with suppress(OSError):  # a link to nothing, or it has gone meanwhile
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    found.append(RepoFile(path.relative_to(snapshot).as_posix(), status.st_size))
    return found


def check_inside(path: Path, cache: Path) -> None:
    """Raises OutsideCache where links lead from `path`, which lies in the cache, to what does not."""
    real = path.resolve()
    if not real.is_relative_to(cache.resolve()):
        raise OutsideCache(
            f"{path}: is a link to {real}, which is not in the cache {cache}",
            hint="name that file by its own path, or remove the link and pull the model again",
        )
