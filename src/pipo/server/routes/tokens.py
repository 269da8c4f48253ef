"""llama.cpp's /tokenize and /detokenize. Source: its `tools/server/README.md`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.server.body import body_of
from pipo.server.replies import JsonResponse
from pipo.server.schemas.completions import DetokenizeBody, TokenizeBody
from pipo.server.service import Service, service_of

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """As much as the context holds: to encode more, there is no memory in the plan."""
    service = service_of(request)
    async with body_of(TokenizeBody, request) as body:
        ids = await service.prompts.tokenize(
            body.content,
            add_special=body.add_special,
            parse_special=body.parse_special,
            max_tokens=service.info.context_tokens,
        )
        if not body.with_pieces:
            return JsonResponse({"tokens": ids})
        return JsonResponse({"tokens": [{"id": each, "piece": _piece(service, each)} for each in ids]})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    async with body_of(DetokenizeBody, request) as body:
        return JsonResponse({"content": await service_of(request).prompts.decode(body.tokens)})


def _piece(service: Service, token_id: int) -> str | list[int]:
    """Bytes where they are not text."""
    text, data = service.prompts.token_text(token_id)
    return text if text.encode() == bytes(data) else data
