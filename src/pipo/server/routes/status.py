"""How the server does: /health, /metrics, /stats for the page, and llama.cpp's /props."""

from __future__ import annotations

import time
from dataclasses import asdict

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from pipo import __version__
from pipo.generation.request import SamplingParams
from pipo.server.errors import ApiError
from pipo.server.replies import JsonResponse
from pipo.server.service import service_of

router = APIRouter()
_NOT_A_DEFAULT = {"max_tokens", "seed", "stop", "logprobs", "logit_bias"}


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """503 with how far it is while the model is loaded."""
    service = service_of(request)
    try:
        service.engine  # noqa: B018 - raises while there is none
    except ApiError as error:
        step, fraction = service.progress
        body = {"status": error.code, "step": step, "fraction": fraction}
        said = {"code": 503, "message": error.message, "type": error.fault.value[1]}
        return JsonResponse(body | {"error": said}, 503, error.headers)
    return JsonResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    service = service_of(request)
    stats = await service.engine.stats() if service.is_ready else None
    return Response(service.metrics.render(stats), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
async def stats(request: Request) -> Response:
    """`engine` are EngineStats, `info` is EngineInfo, `rates` are of the last ten seconds. Seconds and bytes."""
    service, now = service_of(request), time.time()
    found = await service.engine.stats()
    return JsonResponse(
        {
            "status": "ok",
            "version": __version__,
            "model": service.settings.name,
            "now": now,
            "uptime_s": now - service.started_s,
            "info": asdict(service.info),
            "engine": asdict(found),
            "rates": service.metrics.rates(found),
        }
    )


@router.get("/props")
async def props(request: Request) -> Response:
    """The part of llama.cpp's that its clients read."""
    service = service_of(request)
    ids, params = service.prompts.tokenizer.special_ids, asdict(SamplingParams())
    shown = {name: value for name, value in params.items() if name not in _NOT_A_DEFAULT}
    return JsonResponse(
        {
            "default_generation_settings": {"n_ctx": service.info.context_tokens, "params": shown},
            "total_slots": service.info.num_sequences,
            "model_alias": service.settings.name,
            "chat_template": service.prompts.template_text,
            "bos_token": service.prompts.special_text(ids.bos),
            "eos_token": service.prompts.special_text(ids.eos),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"pipo {__version__}",
        }
    )
