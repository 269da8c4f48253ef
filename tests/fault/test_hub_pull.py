"""Models from a hub that fails in every way we know: the right files in the shared cache, or a clear error."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipo.base.errors import DownloadError, ModelNotFound, PipoError, UnsupportedModel, UsageError
from pipo.cli import doctor
from pipo.store import hub as hub_module
from pipo.store.fetch import Patience
from pipo.store.hub_cache import OutsideCache, hub_cache_folder
from pipo.store.hub_name import HubName
from pipo.store.hub_pull import Pulled, pull_from_hub
from pipo.store.library import list_hub_models, resolve_model
from tests.support.hub_server import (
    COMMIT,
    TOKEN,
    Fault,
    Handler,
    Hub,
    Repo,
    drop_after,
    git_sha1,
    hang_up,
    ignore_range,
    running,
    serve,
    serve_corrupt,
    status,
)

DATA = bytes(range(256)) * 12_000  # three chunks
SMALL = b'{"a": 1}'
SHARDS = [f"split/big-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": WEIGHTS[0], "b": WEIGHTS[1]}}).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repos = {
        "org/gguf": Repo(
            {"README.md": b"read me", "m-Q4_K_M.gguf": DATA, "m-Q2_K.gguf": DATA[:1000], SHARDS[0]: DATA[:500_000],
             SHARDS[1]: DATA[500_000:], "mmproj-m-f16.gguf": b"image"}
        ),
        "org/safe": Repo(
            {"config.json": SMALL, "tokenizer.json": SMALL * 9, "tokenizer_config.json": SMALL * 2,
             "README.md": b"read me", "model.safetensors.index.json": INDEX, WEIGHTS[0]: DATA, WEIGHTS[1]: DATA[:77],
             "pytorch_model.bin": b"run!"}
        ),
        "org/single": Repo({"config.json": SMALL, "model.safetensors": DATA, "generation_config.json": b""}),
        "org/pickles": Repo({"config.json": SMALL, "pytorch_model.bin": b"run!"}),
        "org/moved": Repo({"m-Q4_0.gguf": DATA}, spelled="org/gguf"),
        "org/gated": Repo({"m-Q4_0.gguf": DATA}, wants_token="GatedRepo", is_gated=True),
        "org/private": Repo({"m-Q4_0.gguf": DATA}, wants_token="RepoNotFound"),
        "org/partly": Repo({SHARDS[0]: DATA}),
    }  # fmt: skip
    monkeypatch.setattr(hub_module, "_WAIT_S", 0.0)
    monkeypatch.setattr(Patience, "__init__", _hasty)
    with running(Hub(repos)) as hub:
        hub.set_up(monkeypatch, tmp_path / "hf")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield hub


def _hasty(self: Patience, num_tries: int = 4, wait_s: float = 0.0, timeout_s: float = 2.0) -> None:
    for name, value in (("num_tries", num_tries), ("wait_s", wait_s), ("timeout_s", timeout_s)):
        object.__setattr__(self, name, value)


def pull(text: str) -> Pulled:
    name = HubName.parse(text)
    assert name is not None
    return pull_from_hub(name)


def blobs(repo: str = "org--gguf") -> list[str]:
    folder = hub_cache_folder() / f"models--{repo}" / "blobs"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


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
    model = pull("org/safe").model
    assert model.path == resolve_model("org/safe") and model.path.is_dir()
    there = {path.relative_to(model.path).as_posix() for path in model.path.rglob("*")}
    small = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert there == {*small, *WEIGHTS}
    assert (model.path / WEIGHTS[0]).read_bytes() == DATA
    single = pull("org/single").model
    assert {path.name for path in single.files} == {"config.json", "model.safetensors", "generation_config.json"}
    assert [str(model.name) for model in list_hub_models()] == ["org/safe", "org/single"]


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
        (drop_after(1000), "gave up after 4 tries with 4000 of 3072000 bytes"),
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
    assert pull("org/gguf").fetched_bytes == len(DATA) - 4000
    assert hub.ranges == ["bytes=4000-"]


def test_a_part_that_is_not_of_the_file_starts_again(hub: Hub) -> None:
    hub.fail_with(drop_after(1000))
    with pytest.raises(DownloadError):
        pull("org/gguf")
    (part,) = (hub_cache_folder() / "models--org--gguf" / "blobs").iterdir()
    part.write_bytes(b"stale" * 100)
    hub.fail_with(serve)
    assert pull("org/gguf").model.path.read_bytes() == DATA
    assert hub.ranges == ["bytes=500-", None]


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


def test_a_new_commit_replaces_the_name_and_keeps_what_did_not_change(hub: Hub) -> None:
    old = pull("org/gguf").model.path
    pull("org/gguf:Q2_K")
    hub.repos["org/gguf"].commit = "2" * 40
    hub.fail_with(status(500))
    new = pull("org/gguf").model.path
    assert new.parent.name == "2" * 40 and new.resolve() == old.resolve()
    assert resolve_model("org/gguf:Q2_K").parent.name == COMMIT  # which the new commit's snapshot does not have
    assert sorted(str(model.name) for model in list_hub_models()) == ["org/gguf:Q2_K", "org/gguf:Q4_K_M"]


def test_the_hubs_spelling_counts(hub: Hub) -> None:
    hub.repos["org/moved"].files = hub.repos["org/gguf"].files
    assert "models--org--gguf" in str(pull("org/moved").model.path)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("org/none", "has no org/none, or does not show it", "look at the spelling"),
        ("org/private", "has no org/private, or does not show it", "HF_TOKEN"),
        ("org/gated", "org/gated is gated", "accept its terms at"),
        ("org/gguf:Q3_K_L", "has no 'Q3_K_L'; there are Q2_K 1000 B", "org/gguf:Q2_K"),
        ("org/safe:Q4_0", "there is no GGUF file", None),
        ("org/partly", "has 1 of the 2 shards", None),
    ],
)
def test_what_there_is_not(name: str, message: str, hint: str | None, hub: Hub) -> None:
    with pytest.raises(PipoError, match=message) as caught:
        pull(name)
    assert hint is None or (caught.value.hint is not None and hint in caught.value.hint)
    assert hub.large_requests == []


def test_pickles_are_refused_by_name(hub: Hub) -> None:
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin: pickled weights are never read"):
        pull("org/pickles")
    assert not hub_cache_folder().exists()


@pytest.mark.parametrize("name", ["org/gated", "org/private"])
def test_a_token_opens_and_goes_nowhere_else(name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull(name).model.path.read_bytes() == DATA
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in hub.large_requests} == {None}


@pytest.mark.parametrize("token", ["hf_two words", "hf_ümlaut", "hf_a\nX-Evil: 1"])
def test_a_token_that_is_none_is_not_shown(token: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match="characters that no token has") as caught:
        pull("org/gguf")
    assert "hf_" not in repr(caught.value) + str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("api", "num_requests", "message", "hint"),
    [
        (status(429, Retry_After="77"), 1, "asked too often", "try again in 77 s; with HF_TOKEN more is allowed"),
        (status(429, RateLimit='"api";r=0;t=55'), 1, "asked too often", "try again in 55 s"),
        (status(500), 3, "HTTP 500", "try again later"),
        (status(403), 1, "does not give out org/gguf", "HF_TOKEN"),
        (status(401, X_Error_Message="Invalid credentials in Authorization header"), 1, "not know the token", "HF_"),
        (status(200), 1, "does not answer as a hub does", "HF_ENDPOINT"),
        (lambda handler, data: handler.send(200, b'{"id": "org/gguf", "sha": "x"}'), 1, "at commit 'x'", None),
        (lambda handler, data: handler.send(200, b'{"id": "../..", "sha": "%s"}' % (b"1" * 40)), 1, "the name", None),
        (lambda handler, data: handler.send(200, b"[]"), 1, "does not answer as a hub does", "HF_ENDPOINT"),
        (hang_up, 3, "cannot be reached", "HF_ENDPOINT"),
    ],
)  # fmt: skip
def test_a_hub_in_trouble(api: Fault, num_requests: int, message: str, hint: str | None, hub: Hub) -> None:
    hub.hub.state.api = api
    with pytest.raises(PipoError, match=message) as caught:
        pull("org/gguf")
    assert hint is None or (caught.value.hint is not None and hint in caught.value.hint)
    assert len(hub.requests) == num_requests


def test_files_that_would_leave_their_folder_are_not_there(hub: Hub) -> None:
    hub.repos["org/gguf"].files = {"../../../evil-Q4_K_M.gguf": DATA, "/etc/m-Q4_K_M.gguf": DATA}
    with pytest.raises(UnsupportedModel, match="neither a GGUF file"):
        pull("org/gguf")
    hub.repos["org/single"].files["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    with pytest.raises(PipoError, match="wanted the name of a"):
        pull("org/single")


def test_a_mirror_without_hashes(hub: Hub) -> None:
    body = {"id": "org/gguf", "sha": COMMIT, "siblings": [{"rfilename": "m-Q4_K_M.gguf"}]}
    hub.hub.state.api = lambda handler, data: handler.send(200, json.dumps(body).encode())
    with pytest.raises(DownloadError, match=r"gives no size and hash of org/gguf/m-Q4_K_M\.gguf"):
        pull("org/gguf")


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["m-Q4_0.gguf", "1" * 40, "a" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_LFS = st.fixed_dictionaries({}, optional={"size": _JSON, "sha256": _JSON, "pointerSize": _JSON}) | _JSON
_SIBLING = st.fixed_dictionaries({}, optional={"rfilename": _JSON, "size": _JSON, "blobId": _JSON, "lfs": _LFS}) | _JSON
_INFO = st.fixed_dictionaries(
    {"id": st.just("org/gguf") | _JSON, "sha": st.just(COMMIT) | _JSON},
    optional={"siblings": st.lists(_SIBLING, max_size=3) | _JSON, "gated": _JSON, "lastModified": _JSON},
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_INFO | _JSON)
def test_whatever_a_hub_says_is_a_repository_or_an_error(hub: Hub, said: object) -> None:
    hub.hub.state.api = lambda handler, data: handler.send(200, json.dumps(said).encode())
    try:
        found = hub_module.Hub.from_environment().look_up("org/gguf")
    except PipoError as error:
        assert error.message and "\n" not in error.message
    else:
        assert all(file.etag and not file.path.startswith(("/", "..")) for file in found.files)


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
def test_an_endpoint_that_is_none(endpoint: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UsageError, match="HF_ENDPOINT is not an address"):
        pull("org/gguf")


def test_no_route_and_no_name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://me:secret@no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(DownloadError, match="cannot be reached") as caught:
            pull("org/gguf")
        assert caught.value.hint is not None and "secret" not in str(caught.value)


def test_a_mirror_behind_a_password(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the mirror, in a header, and no further; and nobody sees it."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:se%40cret@"))
    assert pull("org/gguf").model.path.read_bytes() == DATA
    basic = "Basic " + base64.b64encode(b"me:se@cret").decode()
    assert {request.authorization for request in hub.requests} == {basic}
    assert {request.authorization for request in hub.large_requests} == {None}
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1")  # where nobody listens
    with pytest.raises(DownloadError) as caught:
        pull("org/gguf")
    assert "secret" not in str(caught.value) + repr(caught.value.__cause__)


def test_a_token_need_not_be_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    pull("org/gguf")
    assert {request.authorization for request in hub.requests} == {None}


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull("org/gguf").model.path
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull("org/gguf").model.path == path
    with pytest.raises(DownloadError, match="org/gguf:Q2_K is not on this machine, and HF_HUB_OFFLINE is set"):
        pull("org/gguf:Q2_K")
    assert hub.requests == []


def test_two_pulls_do_not_spoil_each_others_parts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr("pipo.store.hub_pull._LOCK_WAIT_S", 0.05)
    pull("org/gguf")
    (etag,) = blobs()
    lock = FileLock(hub_cache_folder() / ".locks" / "models--org--gguf" / f"{etag}.lock")
    with lock, pytest.raises(DownloadError, match=r"another program is fetching m-Q4_K_M\.gguf"):
        pull("org/gguf")


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


def test_a_folder_in_the_cache_that_leads_out_of_it(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    repo = hub_cache_folder() / "models--org--gguf"
    repo.mkdir(parents=True)
    (repo / "blobs").symlink_to(tmp_path / "outside")
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
