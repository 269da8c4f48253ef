"""Files of the page: from memory, with their types, and asked for again only when they changed."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import FastAPI

from pipo.server.routes.page import PageFile, page_paths, page_router, read_page

PAGE = {
    "index.html": PageFile(b"<p>hi</p>", "text/html; charset=utf-8", '"one"'),
    "lib/app.js": PageFile(b"let a", "text/javascript; charset=utf-8", '"two"'),
}


def _get(path: str, **headers: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(page_router(PAGE))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get(path, headers=headers)

    return asyncio.run(ask())


def test_the_index_and_its_files() -> None:
    index, script = _get("/"), _get("/static/lib/app.js")
    assert (index.text, index.headers["content-type"]) == ("<p>hi</p>", "text/html; charset=utf-8")
    assert (script.text, script.headers["content-type"]) == ("let a", "text/javascript; charset=utf-8")
    assert page_paths(PAGE) == ["/", "/static/index.html", "/static/lib/app.js"]


def test_what_a_client_has_is_not_sent_again() -> None:
    etag = _get("/static/lib/app.js").headers["etag"]
    again = _get("/static/lib/app.js", **{"if-none-match": f'"other", W/{etag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert _get("/static/lib/app.js", **{"if-none-match": '"other"'}).status_code == 200


def test_what_the_package_has() -> None:
    for name, file in read_page().items():
        assert file.data and file.etag and "octet-stream" not in file.media_type, name
