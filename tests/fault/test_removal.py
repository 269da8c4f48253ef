"""`pipo rm`: what is pulled goes, and nothing else does, whatever links and files lie in the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from pipo.base.errors import DownloadError, ModelNotFound
from pipo.store import library
from pipo.store.fetch import part_path
from pipo.store.hub_cache import OutsideCache, hub_cache_folder
from pipo.store.hub_name import HubName
from pipo.store.hub_pull import pull_from_hub
from pipo.store.library import list_hub_models, resolve_model
from pipo.store.pull import alone_in
from pipo.store.removal import NotRemoved, plan_removal
from tests.support.hub_server import COMMIT, Hub, Repo, drop_after, running, status

DATA = bytes(range(256)) * 100
OTHER = DATA[:5000]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repos = {
        "org/gguf": Repo({"m-Q4_K_M.gguf": DATA, "m-Q8_0.gguf": OTHER, "m-F16.gguf": OTHER[:9]}),
        "org/both": Repo({"m-Q4_0.gguf": DATA, "config.json": b"{}", "model.safetensors": OTHER}),
    }
    with running(Hub(repos)) as hub:
        hub.set_up(monkeypatch, tmp_path / "hf")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield hub


def pull(text: str) -> Path:
    name = HubName.parse(text)
    assert name is not None
    return pull_from_hub(name).model.path


def names() -> list[str]:
    return [str(model.name) for model in list_hub_models()]


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def repo_folder(repo: str = "gguf") -> Path:
    return hub_cache_folder() / f"models--org--{repo}"


def test_a_whole_repository_goes(hub: Hub) -> None:
    pull("org/gguf")
    pull("org/gguf:Q8_0")
    removal = plan_removal("ORG/gguf")
    assert removal.num_bytes == len(DATA) + len(OTHER) and removal.paths == (repo_folder(),)
    assert len(names()) == 2  # planned, not done
    removal.run()
    assert names() == [] and not repo_folder().exists()
    with pytest.raises(ModelNotFound, match="is not on this machine"):
        plan_removal("org/gguf")


def test_one_quantisation_goes_alone(hub: Hub) -> None:
    path = pull("org/gguf")
    pull("org/gguf:Q8_0")
    removal = plan_removal("org/gguf:q4_k_m")
    assert removal.num_bytes == len(DATA) and removal.paths == (path,) and removal.name == "org/gguf:Q4_K_M"
    removal.run()
    assert names() == ["org/gguf:Q8_0"]
    assert resolve_model("org/gguf").read_bytes() == OTHER
    assert len(list((repo_folder() / "blobs").iterdir())) == 1
    plan_removal("org/gguf:Q8_0").run()  # the last one: nothing is worth keeping
    assert not repo_folder().exists()


def test_a_blob_that_another_commit_has_stays(hub: Hub) -> None:
    pull("org/gguf")
    pull("org/gguf:Q8_0")
    hub.repos["org/gguf"].commit = "2" * 40
    pull("org/gguf")
    removal = plan_removal("org/gguf:Q4_K_M")
    assert len(removal.paths) == 2 and removal.num_bytes == len(DATA)
    removal.run()
    assert names() == ["org/gguf:Q8_0"]


def test_safetensors_beside_stay(hub: Hub) -> None:
    pull("org/both:Q4_0")
    folder = repo_folder("both") / "snapshots" / COMMIT
    for name, data in (("config.json", b"{}"), ("model.safetensors", OTHER)):
        (repo_folder("both") / "blobs" / name).write_bytes(data)
        (folder / name).symlink_to(f"../../blobs/{name}")
    plan_removal("org/both:Q4_0").run()
    assert names() == ["org/both"]
    plan_removal("org/both").run()
    assert names() == [] and not repo_folder("both").exists()


def test_what_other_programs_fetched_of_the_repository_stays(hub: Hub) -> None:
    path = pull("org/gguf")
    blob = repo_folder() / "blobs" / "theirs"
    blob.write_bytes(b"theirs")
    (path.parent / "pytorch_model.bin").symlink_to("../../blobs/theirs")
    plan_removal("org/gguf:Q4_K_M").run()
    assert not path.exists() and (path.parent / "pytorch_model.bin").read_bytes() == b"theirs"
    part = blob.with_name("other.incomplete")
    part.write_bytes(b"part")
    pull("org/gguf")
    (path.parent / "pytorch_model.bin").unlink()
    plan_removal("org/gguf:Q4_K_M").run()
    assert part.exists()


def test_an_unfinished_download_goes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail_with(drop_after(100), status(404))
    with pytest.raises(DownloadError):
        pull("org/gguf")
    removal = plan_removal("org/gguf")
    assert removal.num_bytes == 100
    removal.run()
    assert not repo_folder().exists()


def test_a_damaged_repository_goes_whole(hub: Hub) -> None:
    path = pull("org/gguf")
    pull("org/gguf:Q8_0")
    pull("org/gguf:F16").resolve().unlink()
    with pytest.raises(NotRemoved, match="is damaged") as caught:
        plan_removal("org/gguf:Q4_K_M").run()
    assert caught.value.hint == "pipo rm org/gguf removes it all" and path.exists()
    plan_removal("org/gguf").run()
    assert not repo_folder().exists()


@pytest.mark.parametrize("name", ["org/none", "org/gguf:Q2_K", "nothing", "", "../x", "/etc/passwd", "a\0b", "."])
def test_what_is_not_there(name: str, hub: Hub) -> None:
    pull("org/gguf")
    before = contents(hub_cache_folder())
    with pytest.raises(ModelNotFound):
        plan_removal(name)
    assert contents(hub_cache_folder()) == before


def link_from_snapshot(repo: Path, outside: Path) -> Path:
    link = repo / "snapshots" / COMMIT / "m-Q8_0.gguf"
    link.symlink_to(outside / "file")
    return link


def link_to_folder(repo: Path, outside: Path) -> Path:
    link = repo / "snapshots" / COMMIT / "sub"
    link.symlink_to(outside, target_is_directory=True)
    return link


def link_as_blob(repo: Path, outside: Path) -> Path:
    link = repo / "blobs" / ("a" * 64)
    link.symlink_to(outside / "file")
    return link


def link_through_blobs(repo: Path, outside: Path) -> Path:
    (repo / "blobs").rename(outside / "blobs")
    (repo / "blobs").symlink_to(outside / "blobs", target_is_directory=True)
    return repo / "blobs"


def link_as_snapshot(repo: Path, outside: Path) -> Path:
    link = repo / "snapshots" / ("3" * 40)
    link.symlink_to(outside, target_is_directory=True)
    return link


def link_as_ref(repo: Path, outside: Path) -> Path:
    link = repo / "refs" / "other"
    link.symlink_to(outside / "file")
    return link


def link_to_another_repository(repo: Path, outside: Path) -> Path:
    other = repo.parent / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_bytes(b"theirs")
    link = repo / "snapshots" / COMMIT / "x"
    link.symlink_to(other / "x")
    return link


def own_file_beside(repo: Path, outside: Path) -> Path:
    (repo / "notes.txt").write_text("mine")
    return repo / "notes.txt"


def own_file_in_snapshot(repo: Path, outside: Path) -> Path:
    path = repo / "snapshots" / COMMIT / "finetuned.gguf"
    path.write_bytes(b"mine")
    return path


SPOILERS: tuple[Callable[[Path, Path], Path], ...] = (
    link_from_snapshot, link_to_folder, link_as_blob, link_through_blobs, link_as_snapshot, link_as_ref,
    link_to_another_repository, own_file_beside, own_file_in_snapshot,
)  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("name", ["org/gguf", "org/gguf:Q4_K_M"])
def test_nothing_goes_where_not_everything_is_the_caches(
    spoil: Callable[[Path, Path], Path], name: str, hub: Hub, tmp_path: Path
) -> None:
    pull("org/gguf")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"theirs")
    culprit = spoil(repo_folder(), outside)
    before = contents(hub_cache_folder()), contents(outside)
    with pytest.raises(OutsideCache) as caught:
        plan_removal(name)
    assert str(culprit.resolve() if culprit.name == "notes.txt" else culprit) in caught.value.message
    assert (contents(hub_cache_folder()), contents(outside)) == before


def test_a_repository_that_is_a_link(hub: Hub, tmp_path: Path) -> None:
    pull("org/gguf")
    moved = repo_folder().rename(tmp_path / "moved")
    repo_folder().symlink_to(moved, target_is_directory=True)
    with pytest.raises(OutsideCache, match="is a link to"):
        plan_removal("org/gguf")
    assert (moved / "refs" / "main").exists()


def test_a_cache_that_is_a_link_is_the_users_wish(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big drive").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "big drive")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "linked"))
    path = pull("org/gguf")
    assert resolve_model("org/gguf") == path
    plan_removal("org/gguf").run()
    assert not repo_folder().exists()


def test_a_shared_blob_stays_for_the_others(hub: Hub) -> None:
    """As newer versions of huggingface-hub lay them: one copy, and a list of who uses it."""
    blob = pull("org/gguf").resolve()
    shared = hub_cache_folder() / "blobs"
    store = shared / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    plan_removal("org/gguf").run()
    assert not repo_folder().exists() and store.read_bytes() == DATA  # nobody says that it is unused


def test_what_the_system_keeps_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("org/gguf")

    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(NotRemoved, match="cannot be removed"):
        plan_removal("org/gguf").run()
    assert names() == ["org/gguf:Q4_K_M"]


def test_nothing_goes_while_it_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipo.store.hub_pull._LOCK_WAIT_S", 0.05)
    pull("org/gguf")
    (lock,) = (hub_cache_folder() / ".locks" / "models--org--gguf").iterdir()
    with FileLock(lock), pytest.raises(DownloadError, match="another program is fetching a file of org/gguf"):
        plan_removal("org/gguf").run()
    assert names() == ["org/gguf:Q4_K_M"]
    own = library.models_folder() / "own.gguf"
    own.parent.mkdir(parents=True)
    own.write_bytes(DATA)
    with alone_in(own.parent), pytest.raises(DownloadError, match="another pipo is fetching"):
        plan_removal("own").run()
    assert own.exists()


def test_models_in_pipos_own_folder(hub: Hub, tmp_path: Path) -> None:
    folder = library.models_folder()
    folder.mkdir(parents=True)
    known = library.KNOWN_MODELS["smollm2"]
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    own, link = folder / "own.gguf", folder / "linked.gguf"
    for path, data in ((known.path, DATA), (part_path(known.path), b"part"), (own, OTHER)):
        path.write_bytes(data)
    link.symlink_to(tmp_path / "mine.gguf")
    removal = plan_removal("SmolLM2")
    assert removal.name == "smollm2" and removal.num_bytes == len(DATA) + 4
    removal.run()
    plan_removal("own").run()
    linked = plan_removal("linked")
    assert linked.num_bytes == 0
    linked.run()
    assert list(folder.iterdir()) == [] and (tmp_path / "mine.gguf").read_bytes() == b"mine"
