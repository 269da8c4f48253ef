"""One HTTP request: what came, or why it did not. A token or password goes to one server and into no message."""

from __future__ import annotations

import http.client
import re
import ssl
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipo.base.errors import DownloadError


@dataclass(frozen=True, slots=True)
class Address:
    """Where a file is fetched from. `token` goes to the server of `url` alone, and into no message."""

    url: str = field(repr=False)  # may hold a password
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Without the password that an address may hold."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @property
    def authorization(self) -> str | None:
        """What says who asks: the token, else the name and password in the address."""
        if self.token is not None:
            return f"Bearer {self.token}"
        who, at, _ = urlsplit(self.url).netloc.rpartition("@")
        return f"Basic {b64encode(unquote(who).encode()).decode()}" if at else None


class NoAccess(DownloadError):
    """The server wants credentials, its certificate is not trusted, or not a byte came: pip may be set up for it.

    `status` is what the server answered, None where it did not.
    """

    def __init__(self, message: str, *, status: int | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class Dropped(Exception):
    """The connection broke or the server is busy: worth another try, after `wait_s` where the server says so."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Unresumable(Dropped):
    """The server cannot continue where our part ends."""


class _KeepToken(HTTPRedirectHandler):
    """A redirect to another server goes there without the token."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and _server(req.full_url) != _server(newurl):
            request.remove_header("Authorization")
        return request


def _server(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def open_url(address: Address, range_: str, timeout_s: float) -> Any:
    """The response; `range_` is "0-" for the whole, or "FIRST-LAST" in bytes. Raises DownloadError, Dropped."""
    if urlsplit(address.url).scheme not in ("http", "https", "file"):
        raise DownloadError(f"{address}: only http, https and file addresses can be fetched")
    headers = {"User-Agent": "pipo", "Accept-Encoding": "identity"}
    if range_ != "0-":
        headers["Range"] = f"bytes={range_}"
    if address.authorization is not None:
        headers["Authorization"] = address.authorization
    try:
        return build_opener(_KeepToken).open(Request(str(address), headers=headers), timeout=timeout_s)
    except HTTPError as error:
        with error:
            raise _classified(error, address) from error
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise NoAccess(f"{address}: {error.reason}") from error
        if isinstance(error.reason, FileNotFoundError) or address.url.startswith("file:"):
            raise DownloadError(f"{address}: {error.reason}") from error
        raise Dropped(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Dropped(repr(error)) from error


def _classified(error: HTTPError, address: Address) -> Exception:
    what = f"HTTP {error.code} {error.reason}"
    if error.code == 416:
        return Unresumable(what)
    if error.code in (408, 425, 429) or error.code >= 500:
        return Dropped(what, asked_wait_s(error.headers.get("Retry-After")))
    if error.code in (401, 403, 407):
        return NoAccess(f"{address}: {what}", status=error.code)
    return DownloadError(f"{address}: {what}")


def asked_wait_s(retry_after: str | None) -> float:
    """What the server wants waited before the next request; 0 where it does not say, or gives a date."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*", retry_after or "")
    return float(match[1]) if match else 0.0


def content_start(response: Any, offset: int) -> tuple[int, int | None]:
    """Where the response's first byte belongs, 0 from a server that knows no ranges, and the file's size if it says.

    Raises Unresumable where that is not the `offset` asked for.
    """
    if response.status != 206:
        total = response.headers.get("Content-Length", "")
        return 0, int(total) if total.isdecimal() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != offset:
        raise Unresumable("the server sent another range than the one asked for")
    return offset, None if match[2] == "*" else int(match[2])


def reader(response: Any) -> Callable[[int], bytes]:
    """Its `read`, with what breaks a connection as Dropped."""

    def read(num_bytes: int) -> bytes:
        try:
            data: bytes = response.read(num_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise Dropped(repr(error)) from error
        return data

    return read
