"""Models from a hub whose connections break: the right files in the shared cache, or a clear error and none."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipo.base.errors import DownloadError, ModelNotFound
from pipo.store.hub_cache import hub_cache_folder
from pipo.store.library import list_hub_models, resolve_model
from tests.support.hub_repos import DATA, SMALL, WEIGHTS, blobs, pull
from tests.support.hub_server import (
    COMMIT,
    Fault,
    Handler,
    Hub,
    drop_after,
    git_sha1,
    ignore_range,
    serve,
    serve_corrupt,
    status,
)


def test_a_gguf_goes_into_the_shared_cache(hub: Hub) -> None:
    pulled = pull("org/gguf:q4_k_m")
    path = hub_cache_folder() / "models--org--gguf" / "snapshots" / COMMIT / "m-Q4_K_M.gguf"
    assert pulled.model.path == path and path.read_bytes() == DATA and pulled.fetched_bytes == len(DATA)
    assert path.is_symlink() and not path.readlink().is_absolute()
    assert (path.parents[2] / "refs" / "main").read_text() == COMMIT
    assert len(blobs()) == 1 and path.resolve().name == blobs()[0]
    assert resolve_model("org/gguf:Q4_K_M") == resolve_model("ORG/gguf") == path
    assert [str(model.name) for model in list_hub_models()] == ["org/gguf:Q4_K_M"]


def test_all_shards_come(hub: Hub) -> None:
    model = pull("org/gguf:Q8_0").model
    assert b"".join(path.read_bytes() for path in model.files) == DATA
    assert resolve_model("org/gguf:q8_0") == model.files[0] == model.path


def test_a_set_of_safetensors(hub: Hub) -> None:
    pulled = pull("org/safe")
    model = pulled.model
    assert pulled.fetched_bytes == model.num_bytes
    assert model.path == resolve_model("org/safe") and model.path.is_dir()
    there = {path.relative_to(model.path).as_posix() for path in model.path.rglob("*")}
    small = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert there == {*small, *WEIGHTS}
    assert (model.path / WEIGHTS[0]).read_bytes() == DATA
    single = pull("org/single").model
    assert {path.name for path in single.files} == {"config.json", "model.safetensors", "generation_config.json"}
    assert [str(model.name) for model in list_hub_models()] == ["org/safe", "org/single"]


def test_what_is_there_is_compared_not_fetched(hub: Hub) -> None:
    pull("org/gguf")
    hub.fail_with(status(500))
    assert pull("org/gguf").fetched_bytes == 0
    assert hub.large_requests == []


def test_a_damaged_file_is_fetched_again(hub: Hub) -> None:
    path = pull("org/gguf").model.path
    path.write_bytes(DATA[:-1] + b"!")
    assert pull("org/gguf").fetched_bytes == len(DATA)
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([drop_after(1000), serve], [None, "bytes=1000-"]),
        ([drop_after(1000), drop_after(7), serve], [None, "bytes=1000-", "bytes=1007-"]),
        ([drop_after(1000), ignore_range], [None, "bytes=1000-"]),
        ([drop_after(1000), status(416), serve], [None, "bytes=1000-", None]),
        ([status(500), status(429, Retry_After="0"), serve], [None, None, None]),
    ],
)
def test_recovers(faults: list[Fault], ranges: list[str | None], hub: Hub) -> None:
    hub.fail_with(*faults)
    assert pull("org/gguf").model.path.read_bytes() == DATA
    assert hub.ranges == ranges
    assert blobs() == [blobs()[0]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (drop_after(1000), "gave up after 8 tries with 8000 of 3072000 bytes"),
        (status(500), "HTTP 500"),
        (status(404), "HTTP 404"),
        (status(429, Retry_After="4000"), "wants 4000 s until the next request"),
        (serve_corrupt, "their SHA-256 is not"),
    ],
)
def test_a_failure_leaves_nothing_under_a_final_name(fault: Fault, message: str, hub: Hub) -> None:
    hub.fail_with(fault)
    with pytest.raises(DownloadError, match=message):
        pull("org/gguf")
    assert all(name.endswith(".incomplete") for name in blobs())
    with pytest.raises(ModelNotFound, match="is not on this machine"):
        resolve_model("org/gguf")
    assert list_hub_models() == []
    hub.fail_with(serve)
    assert pull("org/gguf").model.path.read_bytes() == DATA


def test_a_later_pull_continues(hub: Hub) -> None:
    hub.fail_with(drop_after(1000))
    with pytest.raises(DownloadError):
        pull("org/gguf")
    hub.fail_with(serve)
    assert pull("org/gguf").fetched_bytes == len(DATA) - 8000
    assert hub.ranges == ["bytes=8000-"]


def test_a_part_that_is_not_of_the_file_starts_again(hub: Hub) -> None:
    hub.fail_with(drop_after(1000))
    with pytest.raises(DownloadError):
        pull("org/gguf")
    (part,) = (hub_cache_folder() / "models--org--gguf" / "blobs").iterdir()
    part.write_bytes(b"stale" * 100)
    hub.fail_with(serve)
    assert pull("org/gguf").model.path.read_bytes() == DATA
    assert hub.ranges == ["bytes=500-", None]


def test_a_part_that_is_a_link_is_not_written_through(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    blob = pull("org/gguf").model.path.resolve()
    blob.rename(tmp_path / "moved")
    blob.with_name(f"{blob.name}.incomplete").symlink_to(tmp_path / "mine")
    assert pull("org/gguf").model.path.read_bytes() == DATA
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_small_files_are_compared_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(handler: Handler) -> None:
        handler.send(200, SMALL[:-1] + b"]")

    monkeypatch.setattr(Handler, "_send_small", lambda handler, path: lie(handler))
    with pytest.raises(DownloadError, match=f"git hash is not {git_sha1(SMALL)}"):
        pull("org/single")
    assert blobs("org--single") == []


def test_a_large_file_comes_in_pieces(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipo.store.fetch._PIECE_BYTES", 1_000_000)
    assert pull("org/gguf").model.path.read_bytes() == DATA
    assert hub.ranges == ["bytes=0-999999", "bytes=1000000-1999999", "bytes=2000000-2999999", "bytes=3000000-"]


def test_a_full_disk_is_said_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"needs 2\.9 MiB, 1000 B are free") as caught:
        pull("org/gguf")
    assert caught.value.hint is not None and "HF_HOME" in caught.value.hint
    assert hub.large_requests == [] and blobs() == []


def test_a_disk_that_fills_on_the_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipo.store.fetch.os.fsync", refuse)
        with pytest.raises(DownloadError, match="No space left on device") as caught:
            pull("org/gguf")
    assert caught.value.hint is not None and "HF_HOME" in caught.value.hint
    assert all(name.endswith(".incomplete") for name in blobs()) and list_hub_models() == []
    assert pull("org/gguf").model.path.read_bytes() == DATA


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("in the way")
    with pytest.raises(DownloadError, match="cannot write") as caught:
        pull("org/gguf")
    assert caught.value.hint is not None and "HF_HOME" in caught.value.hint


def test_a_file_system_without_links(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    path = pull("org/gguf").model.path
    assert not path.is_symlink() and path.read_bytes() == DATA and blobs() == []
    hub.fail_with(status(500))
    assert pull("org/gguf").fetched_bytes == 0


def test_the_hubs_spelling_counts(hub: Hub) -> None:
    hub.repos["org/moved"].files = hub.repos["org/gguf"].files
    assert "models--org--gguf" in str(pull("org/moved").model.path)


def test_two_pulls_do_not_spoil_each_others_parts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr("pipo.store.hub_pull._LOCK_WAIT_S", 0.05)
    pull("org/gguf")
    (etag,) = blobs()
    lock = FileLock(hub_cache_folder() / ".locks" / "models--org--gguf" / f"{etag}.lock")
    with lock, pytest.raises(DownloadError, match=r"another program is fetching m-Q4_K_M\.gguf"):
        pull("org/gguf")
