"""The server inside the xllamacpp wheel, in this process, asked over HTTP."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import xllamacpp

_TIMEOUT_S = 120


class LlamaCppServer:
    """One model. A context manager: leaving it closes the server."""

    def __init__(self, params: xllamacpp.CommonParams) -> None:
        self._server = xllamacpp.Server(params)
        address = urlsplit(self._server.listening_address)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        del self._server

    def _post(self, path: str, **request: object) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
        answer = json.loads(self._connection.getresponse().read())
        assert isinstance(answer, dict) and "error" not in answer, answer
        return answer


def plain_params(path: Path, context_tokens: int) -> xllamacpp.CommonParams:
    """One sequence on one thread, so that runs repeat exactly. Plain weights; nothing warmed up, fitted or kept."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context_tokens
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.no_extra_bufts = True
    params.fit_params = params.warmup = params.cache_prompt = False
    params.cache_ram_mib = params.n_ctx_checkpoints = params.verbosity = 0
    return params
