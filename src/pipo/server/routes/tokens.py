"""llama.cpp's /tokenize and /detokenize. Source: its `tools/server/README.md`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from pipo.server.body import body_of
from pipo.server.replies import JsonResponse
from pipo.server.schemas.completions import DetokenizeBody, TokenizeBody
from pipo.server.service import Service, service_of

router = APIRouter()
_MAX_TOKENS = 1 << 20  # the body is smaller


@router.post("/tokenize")
async def tokenize(body: Annotated[TokenizeBody, Depends(body_of(TokenizeBody))], request: Request) -> Response:
    service = service_of(request)
    ids = await service.prompts.tokenize(
        body.content, add_special=body.add_special, parse_special=body.parse_special, max_tokens=_MAX_TOKENS
    )
    if not body.with_pieces:
        return JsonResponse({"tokens": ids})
    return JsonResponse({"tokens": [{"id": each, "piece": _piece(service, each)} for each in ids]})


@router.post("/detokenize")
async def detokenize(body: Annotated[DetokenizeBody, Depends(body_of(DetokenizeBody))], request: Request) -> Response:
    return JsonResponse({"content": await service_of(request).prompts.decode(body.tokens)})


def _piece(service: Service, token_id: int) -> str | list[int]:
    """Bytes where they are not text."""
    text, data = service.prompts.token_text(token_id)
    return text if text.encode() == bytes(data) else data
