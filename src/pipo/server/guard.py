"""What stands before every route: who may ask, how many at a time, and what happens when they go away.

Plain ASGI, outermost first: headers of answers → Host and Origin → key → number of requests → disconnects.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipo.base.units import format_size
from pipo.server.errors import ApiError, Fault
from pipo.server.replies import error_response
from pipo.server.settings import ServerSettings

# of the page: nothing from elsewhere, and nobody may frame it
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with)


class Guard:
    """Refuses requests for another Host, from another Origin, without the key, and above the number that may run.

    `is_open` paths, and those of the page, need no key.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, open_paths: Sequence[str]) -> None:
        self._app = app
        self._settings = settings
        self._hosts = settings.allowed_hosts
        self._key = settings.api_key.encode() if settings.api_key is not None else None
        self._open_paths = frozenset(open_paths)
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope, Headers(scope=scope))
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._num_running += 1
        try:
            await run_until_disconnect(self._app, scope, receive, send)
        finally:
            self._num_running -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError."""
        most_bytes = self._settings.limits.max_header_bytes  # uvicorn looks only at what arrives in parts
        if len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in headers.raw) > most_bytes:
            raise ApiError(Fault.HEAD_TOO_LARGE, f"the request's head is larger than {format_size(most_bytes)}")
        self._check_host(headers.get("host", ""))
        self._check_origin(headers.get("origin"), headers.get("host", ""))
        is_open = scope["path"] in self._open_paths or scope["method"] == "OPTIONS"
        if self._key is not None and not is_open and not _has_key(headers, self._key):
            raise ApiError(
                Fault.UNAUTHORISED,
                "this server wants an API key: as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
            )
        most = self._settings.limits.max_requests
        if scope["method"] == "POST" and self._num_running >= most:
            raise ApiError(Fault.TOO_MANY, f"{most} requests are running, as many as may", code="too_many_requests")

    def _check_host(self, host: str) -> None:
        if self._hosts is not None and _without_port(host) not in self._hosts:
            raise ApiError(
                Fault.FORBIDDEN,
                f"the Host header names {host!r:.80}; this server answers to {', '.join(sorted(self._hosts))}",
                code="host_not_allowed",
            )

    def _check_origin(self, origin: str | None, host: str) -> None:
        """A page of another origin may not even ask: its browser would hide the answer, but not the work."""
        allowed = self._settings.cors_origins
        if origin is None or "*" in allowed or origin in allowed:
            return
        if origin == "null" or urlsplit(origin).netloc != host:
            raise ApiError(
                Fault.FORBIDDEN, f"pages of {origin!r:.80} may not ask: --cors-origin lets them", code="origin_refused"
            )


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdigit() else host.lower()


def _has_key(headers: Headers, key: bytes) -> bool:
    """Either header; each compared in a time that does not depend on what is wrong."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given += headers.getlist("x-api-key")
    return any(hmac.compare_digest(each.encode("latin-1", "replace"), key) for each in given)


async def run_until_disconnect(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run `app`, and cancel it once the client has gone. Routes may await whatever they like, and need not look."""
    is_read = asyncio.Event()

    async def receive_body() -> Message:
        if is_read.is_set():
            await asyncio.Event().wait()  # the watcher looks for what comes after the body
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            is_read.set()
        return message

    async def watch() -> None:
        await is_read.wait()
        while (await receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(app(scope, receive_body, send))
    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        watcher.cancel()
        work.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)
