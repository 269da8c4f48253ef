"""`pipo rm`: what a model takes on the drive, and how it goes. Looks at every entry before it deletes one.

From the Hugging Face cache huggingface-hub deletes; it would also delete what a link in a snapshot leads to, so a
folder with links that lead elsewhere, or with files that are not the cache's, is refused before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipo.base.errors import ModelNotFound, PipoError
from pipo.formats.native import native_path
from pipo.store.fetch import part_path
from pipo.store.hub_cache import CachedRepo, OutsideCache, files_in, find_repo
from pipo.store.hub_files import Variant, choose_variant, variants_of
from pipo.store.hub_name import HubName
from pipo.store.hub_pull import alone_with
from pipo.store.library import KNOWN_MODELS, models_folder
from pipo.store.pull import alone_in

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy, HFCacheInfo

_HINT = "`pipo list` shows what there is; files elsewhere are yours to remove"
_FOLDERS = {"blobs", "snapshots", "refs", ".no_exist", "trees"}  # of a repository in the cache
_STRAYS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # which systems leave, and huggingface-hub passes over
_SHARED_BLOB = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}")  # in the cache: one copy for several repositories


class NotRemoved(PipoError):
    """The system kept a file that was to go."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What would go: `run` deletes it. `num_bytes` are freed: what others still use does not count.

    `models` are those that would be gone, where it is more than one name tells.
    """

    name: str
    paths: tuple[Path, ...]
    num_bytes: int
    run: Callable[[], None]
    models: tuple[str, ...] = ()


def plan_removal(text: str) -> Removal:
    """Of a model in pipo's folder, or of the hub: `org/name` is all there is of it, `org/name:quant` that alone.

    Deletes nothing yet. Raises ModelNotFound; OutsideCache where not everything is the cache's.
    """
    name = HubName.parse(text)
    return _of_own(text) if name is None else _of_hub(name)


def _of_own(text: str) -> Removal:
    known = KNOWN_MODELS.get(text.lower())
    if known is not None:
        wheel = known.path.with_name(known.source.file_name)
        places = [*_files_of(known.path), wheel, part_path(wheel)]
    elif text and Path(text).name == text and not set(text) & set("/\\\0"):
        places = _files_of(models_folder() / f"{text}.gguf")
    else:
        places = []
    paths = tuple(path for path in places if path.is_symlink() or path.is_file())
    if not paths:
        raise ModelNotFound(f"no model here is called {text!r:.80}", hint=_HINT)
    return Removal(known.name if known else text, paths, _own_bytes(paths), lambda: _remove_own(paths))


def _files_of(path: Path) -> list[Path]:
    """A model, what of it was being fetched, and its weights in another layout."""
    return [path, part_path(path), native_path(path)]


def _own_bytes(paths: Sequence[Path]) -> int:
    """A link frees nothing: what it leads to stays."""
    return sum(path.lstat().st_size for path in paths if not path.is_symlink())


def _remove_own(paths: Sequence[Path]) -> None:
    """Raises DownloadError while one of them is being fetched."""
    with alone_in(models_folder()):
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise NotRemoved(f"{path} cannot be removed: {error.strerror}") from error


def _of_hub(name: HubName) -> Removal:
    repo = find_repo(name.repo)
    if repo is None:
        raise ModelNotFound(f"{name.repo} is not on this machine", hint=_HINT)
    repo = CachedRepo(repo.cache.resolve(), repo.repo, repo.cache.resolve() / repo.folder.name)
    check_entries(repo)
    chosen = [] if name.quant is None else list(_chosen(repo, name))
    if name.quant is None or not _is_more_than(repo, chosen):
        return _whole(repo)
    return _part(repo, name, chosen)


def _chosen(repo: CachedRepo, name: HubName) -> Iterator[tuple[Path, Variant]]:
    """The GGUF that is meant, in every snapshot that has it, whole or not. Raises ModelNotFound where none has."""
    found, there = False, []
    for snapshot in repo.snapshots():
        variants = variants_of(files_in(snapshot))
        there += variants
        if any(variant.is_called(name.quant or "") or variant.has_word(name.quant or "") for variant in variants):
            found = True
            yield snapshot, choose_variant(variants, name)
    if not found:
        choose_variant(there, name)
        raise ModelNotFound(f"{name} is not on this machine", hint=_HINT)


def _is_more_than(repo: CachedRepo, chosen: Sequence[tuple[Path, Variant]]) -> bool:
    """Whether there is a file besides, of whatever program."""
    paths = {snapshot / file.path for snapshot, variant in chosen for file in variant.files}
    there = {Path(folder, name) for folder, _, names in os.walk(repo.folder / "snapshots") for name in names}
    return bool(there - paths) or bool(repo.unfinished())


def _whole(repo: CachedRepo) -> Removal:
    """huggingface-hub leaves a folder that it finds broken, or empty; such a one goes as it is."""
    info, models = _scan(repo), tuple(str(model.name) for model in repo.models())
    revisions = [each.commit_hash for other in info.repos if other.repo_path == repo.folder for each in other.revisions]
    if not revisions:
        sizes = [path.lstat().st_size for path in repo.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return Removal(repo.repo, (repo.folder,), sum(sizes), lambda: _remove_folder(repo), models)
    strategy = info.delete_revisions(*revisions)
    num_bytes = strategy.expected_freed_size + _own_bytes(repo.unfinished())
    return Removal(repo.repo, (repo.folder,), num_bytes, lambda: _execute(repo, strategy, [repo.folder]), models)


def _part(repo: CachedRepo, name: HubName, chosen: Sequence[tuple[Path, Variant]]) -> Removal:
    info = _scan(repo)
    paths = {snapshot / file.path for snapshot, variant in chosen for file in variant.files}
    cached = [
        file
        for other in info.repos
        if other.repo_path == repo.folder
        for revision in other.revisions
        for file in revision.files
        if file.file_path in paths
    ]
    if len({file.file_path for file in cached}) != len(paths):
        broken = "; ".join(str(warning) for warning in info.warnings if str(repo.folder) in str(warning))
        raise NotRemoved(
            f"{repo.folder} is damaged, so nothing of it can be removed alone: {broken:.300}",
            hint=f"pipo rm {repo.repo} removes it all",
        )
    strategy = info.delete_files(*cached)
    run = lambda: _execute(repo, strategy, sorted(paths))  # noqa: E731 - a removal is run later
    return Removal(f"{repo.repo}:{chosen[0][1].label}", tuple(sorted(paths)), strategy.expected_freed_size, run)


def _scan(repo: CachedRepo) -> HFCacheInfo:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(repo.cache)


@contextmanager
def _quiet(repo: CachedRepo) -> Iterator[None]:
    """Nobody fetches a file of the repository meanwhile. Raises DownloadError where someone does."""
    with ExitStack() as locks:
        for lock in (repo.cache / ".locks" / repo.folder.name).glob("*.lock"):
            locks.enter_context(alone_with(lock, f"a file of {repo.repo}"))
        yield


def _execute(repo: CachedRepo, strategy: DeleteCacheStrategy, paths: Sequence[Path]) -> None:
    """huggingface-hub logs what the system refuses, and goes on."""
    try:
        with _quiet(repo):
            strategy.execute()
    except OSError as error:
        raise NotRemoved(f"{error.filename or paths[0]} cannot be removed: {error.strerror or error}") from error
    left = next((path for path in paths if os.path.lexists(path)), None)
    if left is not None:
        raise NotRemoved(f"{left} cannot be removed", hint="may this user write the cache?")


def _remove_folder(repo: CachedRepo) -> None:
    try:
        with _quiet(repo):
            shutil.rmtree(repo.folder)
    except OSError as error:
        raise NotRemoved(f"{error.filename or repo.folder} cannot be removed: {error.strerror}") from error


def check_entries(repo: CachedRepo) -> None:
    """Raises OutsideCache, naming it, for an entry that is not the cache's or leads out of it."""
    if repo.folder.is_symlink():
        raise OutsideCache(f"{repo.folder}: is a link to {repo.folder.readlink()}", hint="remove the link yourself")
    for folder, folders, names in os.walk(repo.folder):
        entries = [Path(folder, name) for name in (*folders, *names) if name not in _STRAYS]
        links = [path for path in entries if path.is_symlink()]
        for link in links:
            _check_link(repo, link)
        parts = Path(folder).relative_to(repo.folder).parts
        foreign = [path for path in entries if not parts and path.name not in _FOLDERS]
        if parts[:1] == ("snapshots",) and links:
            foreign = [path for path in entries if path not in links and not path.is_dir()]
        if foreign:
            raise OutsideCache(
                f"{foreign[0]}: is not of the cache, and would go with the model", hint="move it elsewhere first"
            )


def _check_link(repo: CachedRepo, link: Path) -> None:
    """Links lead from a snapshot to a blob, and from a blob to the cache's shared ones; nowhere else."""
    hop = link.parent / link.readlink()
    target = hop.parent.resolve() / hop.name
    kind = link.relative_to(repo.folder).parts[0]
    if kind == "snapshots" and target.parent == repo.folder / "blobs":
        return
    shared = target.relative_to(repo.cache).as_posix() if target.is_relative_to(repo.cache) else ""
    if kind == "blobs" and _SHARED_BLOB.fullmatch(shared) and not target.is_symlink():
        return
    raise OutsideCache(
        f"{link}: is a link to {target}, which is not the cache's", hint="remove the link itself, then try again"
    )
