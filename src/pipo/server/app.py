"""The FastAPI application: routes, and around them what guards them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipo.base.errors import PipoError
from pipo.server.errors import ApiError, Fault, api_error_of
from pipo.server.guard import Guard, SecurityHeaders
from pipo.server.replies import error_response
from pipo.server.routes import chat, completions, embeddings, messages, models, status, tokens
from pipo.server.routes.page import page_paths, page_router, read_page
from pipo.server.service import Service

_OPEN_PATHS = ["/health", "/v1/health"]  # for those who watch over the server and have no key
_OTHER_ROUTE = "other"


def make_app(service: Service) -> ASGIApp:
    """An ASGI application. What it serves is in `service`, also while that is still loading."""
    app = FastAPI(title="pipo", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    page = read_page()
    for module in (chat, completions, embeddings, models, tokens, status):
        app.include_router(module.router)
        app.include_router(module.router, prefix="/v1")
    app.include_router(messages.router, prefix="/v1")
    app.include_router(page_router(page))
    _add_handlers(app)
    guarded: ASGIApp = _Counting(app, service)
    guarded = Guard(guarded, service.settings, [*_OPEN_PATHS, *page_paths(page)])
    if service.settings.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "anthropic-version", "anthropic-beta"],
        )
    return SecurityHeaders(guarded)


def _add_handlers(app: FastAPI) -> None:
    async def of_ours(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, api_error_of(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path
        if error.status_code == Fault.WRONG_METHOD.status:
            found = ApiError(Fault.WRONG_METHOD, f"{path:.200} does not take {method:.20}")
        elif error.status_code == Fault.NOT_FOUND.status:
            found = ApiError(Fault.NOT_FOUND, f"there is no route {path!r:.200}")
        else:
            found = ApiError(Fault.INVALID, str(error.detail))
        return error_response(path, found)

    async def of_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(PipoError, of_ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(ClientDisconnect, of_gone)
    app.add_exception_handler(Exception, of_ours)


class _Counting:
    """Counts requests by the route that took them and the status they got."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                name = getattr(route, "path", _OTHER_ROUTE) if isinstance(route, BaseRoute) else _OTHER_ROUTE
                self._service.metrics.note_request(name, message["status"])
            await send(message)

        await self._app(scope, receive, send_counted if scope["type"] == "http" else send)
