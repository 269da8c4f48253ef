"""OpenAI's list of models: the one that is served, and the adapters that requests may name instead."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.server.replies import JsonResponse
from pipo.server.service import Service, service_of

router = APIRouter()


@router.get("/models")
async def models(request: Request) -> Response:
    service = service_of(request)
    names = [service.settings.name, *service.info.adapters]
    return JsonResponse({"object": "list", "data": [_model_dict(service, name) for name in names]})


@router.get("/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    service = service_of(request)
    adapter = service.adapters_of(name)
    return JsonResponse(_model_dict(service, adapter or service.settings.name))


def _model_dict(service: Service, name: str) -> dict[str, object]:
    info = service.info
    return {
        "id": name,
        "object": "model",
        "created": int(service.started_s),
        "owned_by": "pipo",
        "parent": None if name == service.settings.name else service.settings.name,
        "meta": {
            "n_ctx_train": info.context_tokens,
            "n_vocab": service.prompts.tokenizer.vocab_size,
        },
    }
