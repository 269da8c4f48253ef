"""The page: files of this package, read once at the start. No request reaches the file system."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from pipo.server.errors import ApiError, Fault

_INDEX = "index.html"
_NO_PAGE = "pipo serves OpenAI's and Anthropic's APIs here: /v1/models, /v1/chat/completions, /v1/messages, /stats\n"
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2", ".json": "application/json"}


@dataclass(frozen=True, slots=True)
class PageFile:
    data: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """Every file of the page by its path below `static`. Empty where this installation has none."""
    folder = files("pipo.server") / "static"
    return dict(_walk(folder, "")) if folder.is_dir() else {}


def page_paths(page: Mapping[str, PageFile]) -> list[str]:
    """Where they are served."""
    return ["/", *(f"/static/{name}" for name in page)]


def page_router(page: Mapping[str, PageFile]) -> APIRouter:
    router = APIRouter()

    @router.get("/")
    async def index(request: Request) -> Response:
        return _reply(request, page[_INDEX]) if _INDEX in page else PlainTextResponse(_NO_PAGE)

    @router.get("/static/{name:path}")
    async def file(name: str, request: Request) -> Response:
        if name not in page:
            raise ApiError(Fault.NOT_FOUND, f"the page has no file {name!r:.80}")
        return _reply(request, page[name])

    return router


def _reply(request: Request, file: PageFile) -> Response:
    """304 where the client has it: it asks each time, so that an update is seen at once."""
    headers = {"etag": file.etag, "cache-control": "no-cache"}
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, PageFile]]:
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif not entry.name.startswith("."):
            yield f"{prefix}{entry.name}", _page_file(entry)


def _page_file(entry: Traversable) -> PageFile:
    data = entry.read_bytes()
    suffix = entry.name[entry.name.rfind(".") :]
    kind = _TYPES.get(suffix) or mimetypes.types_map.get(suffix, "application/octet-stream")
    media_type = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
    return PageFile(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:20]}"')
