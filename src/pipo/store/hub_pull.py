"""Fetch a model of the Hugging Face hub into the cache that other programs share.

huggingface-hub says what there is; the bytes are fetched here, because its own download begins again after a break and
does not compare what came (docs/adr/0007). A blob gets its name, and a snapshot its link, once the bytes have the hash
that the hub names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipo.base.errors import DownloadError, ModelNotFound
from pipo.store.fetch import Destination, Progress, check_space, download, is_intact, silent
from pipo.store.hub import Hub, HubFile, HubRepo, is_offline
from pipo.store.hub_cache import PART_SUFFIX, CachedModel, check_inside, find_model, hub_cache_folder, repo_folder
from pipo.store.hub_files import (
    INDEX,
    check_index_size,
    choose_variant,
    has_safetensors,
    refuse_unusable,
    safetensors_set,
    variants_of,
)
from pipo.store.hub_name import HubName
from pipo.store.request import NoAccess

log = logging.getLogger(__name__)

Announce = Callable[[Sequence[HubFile]], None]

_VARIABLE = "HF_HOME"
_LOCK_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Pulled:
    """What is there now, and how much of it had to be fetched."""

    model: CachedModel
    fetched_bytes: int


def pull_from_hub(name: HubName, *, progress: Progress = silent, announce: Announce = lambda files: None) -> Pulled:
    """Fetch what of the model is not there and intact. With HF_HUB_OFFLINE: what is there.

    `announce` is told the files before they come.

    Raises: ModelNotFound (no such repository or quantisation), UnsupportedModel (nothing that pipo would open),
    DownloadError.
    """
    if is_offline():
        try:
            return Pulled(find_model(name), 0)
        except ModelNotFound as error:
            raise DownloadError(
                f"{name} is not on this machine, and HF_HUB_OFFLINE is set", hint="unset it to fetch the model"
            ) from error
    repo = Hub.from_environment().look_up(name.repo)
    keeper = _Keeper(repo, hub_cache_folder(), _Total(progress))
    with _disk_errors(keeper.folder):
        files = keeper.files_of(name)
        announce(files)
        keeper.keep(files)
        keeper.mark_newest()
    return Pulled(find_model(HubName(repo.repo, name.quant)), keeper.total.fetched_bytes)


def gguf_files(repo: HubRepo, name: HubName) -> list[HubFile]:
    """All shards of the GGUF model that is meant; none where the name means a set of safetensors.

    Raises ModelNotFound, UnsupportedModel.
    """
    variants = variants_of(repo.files)
    if not variants and name.quant is None and has_safetensors(repo.files):
        return []
    if not variants and not has_safetensors(repo.files):
        raise refuse_unusable(name, repo.files)
    chosen = choose_variant(variants, name)
    if not chosen.is_complete:
        raise ModelNotFound(f"{repo.repo} has {len(chosen.files)} of the {chosen.num_shards} shards of {chosen.stem}")
    wanted = {file.path for file in chosen.files}
    return sorted((file for file in repo.files if file.path in wanted), key=lambda file: file.path)


@dataclass(slots=True)
class _Total:
    """Progress of several files as that of one."""

    progress: Progress
    num_bytes: dict[str, int] = field(default_factory=dict)  # by what is done, in all
    done: dict[str, int] = field(default_factory=dict)  # of the files before this one
    fetched_bytes: int = 0

    def start(self, files: Sequence[HubFile], missing: Sequence[HubFile]) -> None:
        self.num_bytes = {"verify": _size_of(files), "download": _size_of(missing)}
        self.done = {}

    def report(self, what: str, done_bytes: int, num_bytes: int) -> None:
        done_bytes += self.done.get(what, 0)
        self.progress(what, done_bytes, max(self.num_bytes.get(what, 0), done_bytes))

    def end(self, file: HubFile, *, is_fetched: bool) -> None:
        for what in ("verify", "download") if is_fetched else ("verify",):
            self.done[what] = self.done.get(what, 0) + file.num_bytes


def _size_of(files: Sequence[HubFile]) -> int:
    return sum(file.num_bytes for file in files)


@dataclass(frozen=True, slots=True)
class _Keeper:
    """One repository's folder in the cache, while files come into it."""

    repo: HubRepo
    cache: Path
    total: _Total

    @property
    def folder(self) -> Path:
        return repo_folder(self.cache, self.repo.repo)

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.repo.revision

    def files_of(self, name: HubName) -> list[HubFile]:
        """An index of safetensors is fetched on the way: it names the rest."""
        files = gguf_files(self.repo, name)
        if files:
            return files
        index_file = next((file for file in self.repo.files if file.path == INDEX), None)
        index = None
        if index_file is not None:
            check_index_size(index_file)
            self.keep([index_file])
            index = self.blob_of(index_file).read_bytes()
        wanted = {file.path for file in safetensors_set(self.repo.files, index)}
        return [file for file in self.repo.files if file.path in wanted]

    def keep(self, files: Sequence[HubFile]) -> None:
        """Fetch those that are not there and intact. Raises DownloadError."""
        self.total.start(files, [file for file in files if self._missing_bytes(file)])
        check_space(self.cache, sum(self._missing_bytes(file) for file in files), _VARIABLE)
        self._make_folder(self.snapshot)
        for file in files:
            self._keep(file)

    def _keep(self, file: HubFile) -> None:
        blob = self.blob_of(file)
        self._make_folder(blob.parent)
        with self._alone_with(file):
            is_there = is_intact(blob, file.expected, self.total.report)
            if not is_there:
                self.total.fetched_bytes += file.num_bytes if blob.exists() else self._missing_bytes(file)
                self._fetch(file, blob)
            self._link(blob, self.snapshot / file.path)
        self.total.end(file, is_fetched=not is_there)

    def _make_folder(self, folder: Path) -> None:
        """Raises OutsideCache where a link leads it out."""
        check_inside(folder, self.cache)
        folder.mkdir(parents=True, exist_ok=True)

    def _fetch(self, file: HubFile, blob: Path) -> None:
        if blob.exists():
            log.warning("file=%s reason=%r action=fetch again", blob, "damaged")
        to = Destination(blob, PART_SUFFIX, _VARIABLE)
        if to.part.is_symlink():  # what it leads to would be written
            to.part.unlink()
        try:
            download(self.repo.address_of(file), to, file.expected, progress=self.total.report)
        except NoAccess as error:
            raise self.repo.explain(error) from error

    def blob_of(self, file: HubFile) -> Path:
        """Where the bytes are. A file system without links has them under their own name."""
        pointer = self.snapshot / file.path
        if pointer.is_file() and not pointer.is_symlink():
            return pointer
        return self.folder / "blobs" / file.etag

    def _missing_bytes(self, file: HubFile) -> int:
        blob = self.blob_of(file)
        part = Destination(blob, PART_SUFFIX).part
        have = next((path.stat().st_size for path in (blob, part) if path.is_file()), 0)
        return max(file.num_bytes - have, 0)

    def _link(self, blob: Path, pointer: Path) -> None:
        """Replaces what is there: an older link, or one that leads elsewhere."""
        if blob == pointer:
            return
        self._make_folder(pointer.parent)
        aside = pointer.with_name(f".{pointer.name}.{os.getpid()}")
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(os.path.relpath(blob, pointer.parent))
            aside.replace(pointer)
        except OSError as error:  # a file system without links
            log.warning("file=%s reason=%r action=keep it under its own name", pointer, error)
            blob.replace(pointer)

    def mark_newest(self) -> None:
        """`main` is this commit, for every program that shares the cache."""
        main = self.folder / "refs" / "main"
        self._make_folder(main.parent)
        aside = main.with_name(f".main.{os.getpid()}")
        aside.write_text(self.repo.revision)
        aside.replace(main)

    def _alone_with(self, file: HubFile) -> AbstractContextManager[None]:
        return alone_with(lock_of(self.cache, self.folder.name, file.etag), file.path)


def lock_of(cache: Path, folder: str, etag: str) -> Path:
    """That huggingface-hub takes for the same file."""
    return cache / ".locks" / folder / f"{etag}.lock"


@contextmanager
def alone_with(lock: Path, what: str) -> Iterator[None]:
    """Raises DownloadError where another program has the lock."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=_LOCK_WAIT_S):
            yield
    except Timeout as error:
        raise DownloadError(
            f"another program is fetching {what}", hint=f"wait until it has ended; where none is, remove {lock}"
        ) from error


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # of whoever is told how far it is
        raise
    except OSError as error:
        raise DownloadError(f"cannot write {folder}: {error}", hint=f"{_VARIABLE} names another place") from error
