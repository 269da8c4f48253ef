"""A Hugging Face hub on 127.0.0.1: what is in a repository, and its files, badly on demand.

Large files are kept as the hub keeps them: behind a redirect to another server, which must see no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_not_to_be_shown_1234567890"
COMMIT = "1" * 40
LFS_SUFFIXES = (".gguf", ".safetensors", ".bin")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")

Fault = Callable[["Handler", bytes], None]  # answers a request for these bytes


@dataclass
class Repo:
    """What the hub has. `wants_token` is the error code without one: GatedRepo or RepoNotFound."""

    files: dict[str, bytes]
    commit: str = COMMIT
    wants_token: str | None = None
    is_gated: bool = False
    spelled: str | None = None  # as the hub spells it


@dataclass
class Request:
    verb: str
    path: str
    range_: str | None
    authorization: str | None


@dataclass
class State:
    """`faults` answer requests for large files one after another, the last one for ever."""

    repos: Mapping[str, Repo]
    faults: list[Fault] = field(default_factory=list)
    api: Fault | None = None  # answers what is asked of the hub itself
    requests: list[Request] = field(default_factory=list)
    closing: Event = field(default_factory=Event)
    large_url: str = ""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, state: State) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = state

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has enough, or was killed, is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Two servers: the hub at `url`, and the one that has large files. `requests` are those of the first."""

    def __init__(self, repos: Mapping[str, Repo], *faults: Fault, api: Fault | None = None) -> None:
        self.hub, self.large = Server(State(repos, api=api)), Server(State(repos, list(faults)))
        self.hub.state.large_url = self.large.url
        self.url = self.hub.url
        self.repos = repos

    @property
    def requests(self) -> list[Request]:
        return self.hub.state.requests

    @property
    def large_requests(self) -> list[Request]:
        return self.large.state.requests

    @property
    def ranges(self) -> list[str | None]:
        return [request.range_ for request in self.large_requests if request.verb == "GET"]

    def fail_with(self, *faults: Fault) -> None:
        self.large.state.faults = list(faults)
        self.large_requests.clear()

    def environment(self, folder: object, **more: str) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HOME": f"{folder}", "no_proxy": "127.0.0.1", **more}

    def set_up(self, monkeypatch: pytest.MonkeyPatch, folder: object, **more: str) -> None:
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(folder, **more).items():
            monkeypatch.setenv(name, value)


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    servers = (hub.hub, hub.large)
    threads = [Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.state.closing.set()
            server.shutdown()
            thread.join()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._note()
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        if path.startswith("/large/"):
            self._send_large(path.removeprefix("/large/"))
        elif self.server.state.api is not None:
            self.server.state.api(self, b"")
        elif path.startswith("/api/models/"):
            self._send_info(path.removeprefix("/api/models/"), query)
        elif path.startswith("/api/resolve-cache/"):
            self._send_small(path.removeprefix("/api/resolve-cache/"))
        else:
            self._send_resolved(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _note(self) -> None:
        headers = self.headers
        request = Request(self.command, self.path, headers.get("Range"), headers.get("Authorization"))
        self.server.state.requests.append(request)

    @property
    def first(self) -> int:
        match = _RANGE.fullmatch(self.headers.get("Range") or "")
        return int(match[1]) if match else 0

    def send(self, status: int, body: bytes = b"", *, num_bytes: int | None = None, **headers: str) -> None:
        """A body that may be shorter than the `num_bytes` announced; then the connection ends."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if num_bytes is None else num_bytes))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if num_bytes is not None:
            self.close_connection = True

    def send_ranged(self, data: bytes, *, most_bytes: int | None = None, **headers: str) -> None:
        """As a server with ranges does; hangs up after `most_bytes`."""
        match = _RANGE.fullmatch(self.headers.get("Range") or "")
        if match is None:
            body, status = data, 200
        else:
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            if first >= len(data):
                self.send(416)
                return
            last = min(last, len(data) - 1)
            body, status = data[first : last + 1], 206
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(status, body[:most_bytes], num_bytes=None if most_bytes is None else len(body), **headers)

    def _repo(self, name: str) -> Repo | None:
        """None: an answer was sent."""
        repo = self.server.state.repos.get(name)
        if repo is None:
            self.send(401 if self._token() is None else 404, b"{}", X_Error_Code="RepoNotFound")
            return None
        if repo.wants_token == "RepoNotFound" and self._token() != TOKEN:
            self.send(401, b"{}", X_Error_Code="RepoNotFound")
            return None
        return repo

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _send_info(self, name: str, query: Mapping[str, list[str]]) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        siblings = [_sibling(path, data, "blobs" in query) for path, data in repo.files.items()]
        gated = "manual" if repo.is_gated else False
        info = {"id": repo.spelled or name, "sha": repo.commit, "private": False, "gated": gated, "siblings": siblings}
        self.send(200, json.dumps(info).encode(), Content_Type="application/json")

    def _send_resolved(self, path: str) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self._repo(match[1]) if match else None
        if match is None or repo is None:
            if match is None:
                self.send(404)
            return
        data, commit = repo.files.get(match[3]), repo.commit
        if match[2] not in (commit, "main"):
            self.send(404, X_Error_Code="RevisionNotFound")
        elif data is None:
            self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif repo.wants_token == "GatedRepo" and self._token() != TOKEN:
            self.send(401 if self._token() is None else 403, X_Error_Code="GatedRepo")
        elif match[3].endswith(LFS_SUFFIXES):
            sha256 = hashlib.sha256(data).hexdigest()
            linked = {"X_Linked_Size": str(len(data)), "X_Linked_ETag": f'"{sha256}"', "X_Repo_Commit": commit}
            location = f"{self.server.state.large_url}/large/{match[1]}/{match[3]}?signed=for-a-while"
            self.send(302, Location=location, ETag=f'"{"0" * 40}"', **linked)
        else:
            location = f"/api/resolve-cache/{match[1]}/{match[3]}"
            self.send(307, Location=location, ETag=f'"{git_sha1(data)}"', X_Repo_Commit=commit)

    def _send_small(self, path: str) -> None:
        owner, name, file = path.split("/", 2)
        repo = self._repo(f"{owner}/{name}")
        if repo is not None:
            data = repo.files[file]
            self.send_ranged(data, ETag=f'"{git_sha1(data)}"', X_Repo_Commit=repo.commit)

    def _send_large(self, path: str) -> None:
        owner, name, file = path.split("/", 2)
        data, faults = self.server.state.repos[f"{owner}/{name}"].files[file], self.server.state.faults
        fault = serve if not faults else faults.pop(0) if len(faults) > 1 else faults[0]
        fault(self, data)


def _sibling(path: str, data: bytes, has_blobs: bool) -> dict[str, Any]:
    if not has_blobs:
        return {"rfilename": path}
    found: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if path.endswith(LFS_SUFFIXES):
        found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return found


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def serve(handler: Handler, data: bytes) -> None:
    handler.send_ranged(data)


def serve_corrupt(handler: Handler, data: bytes) -> None:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    handler.send_ranged(bytes(changed))


def ignore_range(handler: Handler, data: bytes) -> None:
    handler.send(200, data)


def drop_after(num_bytes: int) -> Fault:
    """Announce everything left, send only this much, and hang up."""
    return lambda handler, data: handler.send_ranged(data, most_bytes=num_bytes)


def hang_up(handler: Handler, data: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def stall_after(num_bytes: int) -> Fault:
    """Announce everything left, send only this much, and say nothing more."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.send_ranged(data, most_bytes=num_bytes)
        handler.wfile.flush()
        handler.server.state.closing.wait(60)

    return fault


def status(code: int, **headers: str) -> Fault:
    return lambda handler, data: handler.send(code, b"<html>sorry</html>", **headers)
