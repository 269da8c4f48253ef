"""Models of the hub by name, without network: what is in the shared cache, and links that lead out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipo.base.errors import DownloadError, ModelNotFound
from pipo.cli import doctor
from pipo.store.hub_cache import OutsideCache, hub_cache_folder
from pipo.store.library import list_hub_models, resolve_model
from tests.support.hub_repos import DATA, WEIGHTS, pull
from tests.support.hub_server import (
    COMMIT,
    Hub,
    serve,
    status,
)


def test_files_lie_as_huggingface_hub_puts_them(hub: Hub, tmp_path: Path) -> None:
    """Its own download finds all of ours, and fetches nothing."""
    paths = [pull("org/gguf").model.path, pull("org/single").model.path / "config.json"]
    hub.fail_with(serve)
    code = (
        "from huggingface_hub import hf_hub_download as get\n"
        "print(get('org/gguf', 'm-Q4_K_M.gguf'))\n"
        "print(get('org/single', 'config.json'))\n"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(path) for path in paths], done.stderr
    assert hub.ranges == []  # it asks for heads; no body


def test_a_new_commit_replaces_the_name_and_keeps_what_did_not_change(hub: Hub) -> None:
    old = pull("org/gguf").model.path
    pull("org/gguf:Q2_K")
    hub.repos["org/gguf"].commit = "2" * 40
    hub.fail_with(status(500))
    new = pull("org/gguf").model.path
    assert new.parent.name == "2" * 40 and new.resolve() == old.resolve()
    assert resolve_model("org/gguf:Q2_K").parent.name == COMMIT  # which the new commit's snapshot does not have
    assert sorted(str(model.name) for model in list_hub_models()) == ["org/gguf:Q2_K", "org/gguf:Q4_K_M"]


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull("org/gguf").model.path
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull("org/gguf").model.path == path
    with pytest.raises(DownloadError, match="org/gguf:Q2_K is not on this machine, and HF_HUB_OFFLINE is set"):
        pull("org/gguf:Q2_K")
    assert hub.requests == []


def test_not_pulled_says_how(hub: Hub) -> None:
    with pytest.raises(ModelNotFound, match="org/gguf:Q8_0 is not on this machine") as caught:
        resolve_model("org/gguf:Q8_0")
    assert caught.value.hint == "pipo pull org/gguf:Q8_0"
    model = pull("org/gguf:Q8_0").model
    model.files[1].unlink()
    with pytest.raises(ModelNotFound, match="is not whole: 1 of its 2 shards are here"):
        resolve_model("org/gguf:Q8_0")
    assert list_hub_models() == []
    folder = pull("org/safe").model.path
    (folder / WEIGHTS[1]).resolve().unlink()
    with pytest.raises(ModelNotFound, match="org/safe is not on this machine"):
        resolve_model("org/safe")
    assert hub.requests[-1].verb == "GET"


def test_doctor_reads_the_drive_with_what_was_pulled(hub: Hub) -> None:
    pull("org/safe")
    model = pull("org/gguf").model
    assert doctor._file_to_read(None) == model.path


def test_a_path_comes_before_a_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("org/gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "gguf").write_bytes(b"")
    assert resolve_model("org/gguf") == Path("org/gguf")


def test_links_that_lead_out_of_the_cache_are_refused(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(DATA)
    path = pull("org/gguf").model.path
    pull("org/single")
    for link in (path, path.resolve()):  # of the snapshot, and of the blob
        link.unlink()
        link.symlink_to(outside)
        with pytest.raises(OutsideCache, match=f"is a link to {outside}"):
            resolve_model("org/gguf")
        link.unlink()
        pull("org/gguf")
    path.unlink()
    path.symlink_to(outside)
    assert [str(model.name) for model in list_hub_models()] == ["org/single"]
    assert "outside.gguf" in caplog.text
    assert pull("org/gguf").model.path.resolve() != outside and outside.read_bytes() == DATA


@pytest.mark.parametrize("name", ["blobs", "snapshots", "refs"])
def test_a_folder_in_the_cache_that_leads_out_of_it(name: str, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    repo = hub_cache_folder() / "models--org--gguf"
    repo.mkdir(parents=True)
    (repo / name).symlink_to(tmp_path / "outside")
    with pytest.raises(OutsideCache):
        pull("org/gguf")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_shared_store_of_blobs_is_in_the_cache(hub: Hub) -> None:
    """Newer versions of huggingface-hub keep one copy for several repositories."""
    blob = pull("org/gguf").model.path.resolve()
    store = hub_cache_folder() / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    assert resolve_model("org/gguf").read_bytes() == DATA
    assert pull("org/gguf").fetched_bytes == 0


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a/b", "HF_HOME": "/c"}, "/a/b"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/c"}, "/old"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "~/y"}, f"{Path.home()}/y/hub"),
        ({}, f"{Path.home()}/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(environment: dict[str, str], folder: str) -> None:
    assert str(hub_cache_folder(environment)) == folder
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == folder
