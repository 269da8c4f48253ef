"""Answers that are not streams: JSON, and errors in the shape of the API that was asked."""

from __future__ import annotations

import json

from starlette.responses import Response

from pipo.server.errors import ApiError, anthropic_error, openai_error

_ANTHROPIC_PATHS = "/v1/messages"
ANTHROPIC_OVERLOADED = 529  # what its clients know for "later"


class JsonResponse(Response):
    """As text is, not escaped; NaN is refused."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def is_anthropic(path: str) -> bool:
    return path.startswith(_ANTHROPIC_PATHS)


def error_body(path: str, error: ApiError) -> dict[str, object]:
    return anthropic_error(error) if is_anthropic(path) else openai_error(error)


def error_response(path: str, error: ApiError) -> JsonResponse:
    status = error.fault.status
    if is_anthropic(path) and status == 503:
        status = ANTHROPIC_OVERLOADED
    headers = dict(error.headers)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JsonResponse(error_body(path, error), status, headers)
