"""OpenAI's embeddings: the last token's normed hidden state."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.server.answers import Embeddings
from pipo.server.body import body_of
from pipo.server.errors import invalid
from pipo.server.replies import JsonResponse
from pipo.server.routes.chat import check_choices
from pipo.server.schemas.completions import EmbeddingsBody, prompts_in
from pipo.server.service import Service, service_of

router = APIRouter()


@router.post("/embeddings")
async def embeddings(request: Request) -> Response:
    service = service_of(request)
    async with body_of(EmbeddingsBody, request) as body:
        prompts = await _encoded(service, body)
        model, form = body.model or service.settings.name, body.encoding_format
    del body
    vectors = await Embeddings(service, prompts).vectors()
    num_tokens = sum(map(len, prompts))
    return JsonResponse(
        {
            "object": "list",
            "model": model,
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(vector, form)}
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _encoded(service: Service, body: EmbeddingsBody) -> list[list[int]]:
    """Raises ApiError, PipoError."""
    if service.adapters_of(body.model) is not None:
        raise invalid("embeddings of an adapter are not supported: name the model", "model")
    inputs = prompts_in(body.input)
    check_choices(service, len(inputs))
    prompts = []
    for each in inputs:
        ids = each if isinstance(each, list) else await service.prompts.encode(each, service.info.context_tokens)
        if not ids:
            raise invalid("an input is empty", "input")
        service.prompts.check_ids(ids)
        service.check_lengths(len(ids), None)
        prompts.append(ids)
    return prompts


def _written(vector: Sequence[float], form: str | None) -> str | list[float]:
    """base64 is of little-endian float32."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else list(vector)
