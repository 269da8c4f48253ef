"""What a hub refuses, and hubs that are none: one clear error with a hint, and no token in it."""

from __future__ import annotations

import base64
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipo.base.errors import DownloadError, PipoError, UnsupportedModel, UsageError
from pipo.store import hub as hub_module
from pipo.store.hub_cache import hub_cache_folder
from tests.support.hub_repos import DATA, pull
from tests.support.hub_server import (
    COMMIT,
    TOKEN,
    Fault,
    Hub,
    hang_up,
    status,
)


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
    del hub.repos["org/single"].files["model.safetensors"]
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


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    def nobody_knows(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for endpoint in ("http://127.0.0.1:9", "http://me:secret@no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(DownloadError, match="cannot be reached") as caught:
            pull("org/gguf")
        assert caught.value.hint is not None and "secret" not in str(caught.value)
        monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    assert "Name or service not known" in caught.value.message


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
