"""How a server begins and ends: what is said while the model is loaded, and to those who wait when everything ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pipo.base.errors import EngineDied
from pipo.server.app import make_app
from pipo.server.errors import ApiError
from pipo.server.service import Service
from pipo.server.settings import ServerSettings
from pipo.serving.contract import ServedEngine
from tests.support.fake_engine import FakeEngine
from tests.support.serving import WAIT_S, RunningServer, running, small_prompts

PROMPTS = small_prompts()
HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


def _engine(**changes: Any) -> FakeEngine:
    return FakeEngine(PROMPTS.tokenizer, **changes)


def _slow() -> FakeEngine:
    return _engine(text="word " * 400, context_tokens=4096, delay_s=0.02)


def test_who_waits_for_embeddings_is_told_of_the_end() -> None:
    engine = _engine(delay_s=1000.0)
    with running(engine, PROMPTS) as server:
        texts: list[str] = []
        asking = threading.Thread(
            target=lambda: texts.append(server.http.post("/v1/embeddings", json={"input": "a"}).text)
        )
        asking.start()
        server.wait_for(lambda: engine.num_running == 1)
        server.server.end()
        asking.join(WAIT_S)
    assert json.loads(texts[0])["error"]["code"] == "shutting_down" and engine.num_running == 0


def test_running_requests_are_told_of_the_end() -> None:
    engine = _slow()
    found: dict[str, str] = {}

    def ask(server: RunningServer, stream: bool) -> None:
        found[str(stream)] = server.http.post(CHAT, json={"messages": HELLO, "stream": stream}).text

    with running(engine, PROMPTS) as server:
        threads = [threading.Thread(target=ask, args=(server, stream)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        server.wait_for(lambda: engine.num_running == 2)
        server.server.end()
        for thread in threads:
            thread.join(WAIT_S)
        server.thread.join(WAIT_S)
    assert "the server is shutting down" in found["True"] and "[DONE]" not in found["True"]
    assert json.loads(found["False"])["error"]["code"] == "shutting_down"
    assert engine.is_closed and engine.num_cancelled == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_ends_the_server_and_everybody_hears_why(stream: bool) -> None:
    engine = _slow()
    with running(engine, PROMPTS) as server:
        texts: list[str] = []
        asking = threading.Thread(
            target=lambda: texts.append(server.http.post(CHAT, json={"messages": HELLO, "stream": stream}).text)
        )
        asking.start()
        server.wait_for(lambda: engine.num_running == 1)
        server.call(lambda: engine.die(EngineDied("the engine's process has ended (signal SIGKILL)")))
        asking.join(WAIT_S)
        server.thread.join(WAIT_S)
        assert "has ended (signal SIGKILL); this server ends with it" in texts[0] and "engine_died" in texts[0]
        assert isinstance(server.error, EngineDied) and engine.is_closed


def test_health_of_a_server_whose_engine_has_died() -> None:
    service = Service(ServerSettings("small"), PROMPTS)
    service.ready(_engine())
    service.stop(EngineDied("it has ended"))
    app = make_app(service)
    with pytest.raises(ApiError, match="it has ended"):
        _ = service.engine

    async def ask() -> tuple[httpx.Response, ...]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get("/health"), await http.get("/metrics"), await http.get("/stats")

    health, metrics, stats = asyncio.run(ask())
    assert health.status_code == 503 and health.json()["status"] == "engine_died"
    assert "pipo_ready 0.0" in metrics.text and stats.status_code == 500


def test_a_second_signal_waits_for_no_engine() -> None:
    engine = _engine(is_stuck=True)
    with running(engine, PROMPTS) as server:
        server.server.end()
        server.wait_for(lambda: engine.is_closing)
        assert server.thread.is_alive()
        server.server.kill()
        server.thread.join(WAIT_S)
        assert engine.is_killed and server.error is None


def test_health_says_how_far_loading_is() -> None:
    engine, is_loaded = _engine(), threading.Event()

    async def load(progress: Callable[[str, float], None]) -> ServedEngine:
        progress("measuring", 0.5)
        while not is_loaded.is_set():
            await asyncio.sleep(0.01)
        return engine

    with running(engine, PROMPTS, open_engine=load) as server:
        server.wait_for(lambda: server.http.get("/health").json().get("step") == "measuring")
        reply = server.http.get("/health")
        assert reply.status_code == 503 and reply.json()["fraction"] == 0.5 and reply.headers["retry-after"] == "1"
        refused = server.http.post(CHAT, json={"messages": HELLO})
        assert refused.status_code == 503 and "measuring, 50%" in refused.json()["error"]["message"]
        assert "pipo_ready 0.0" in server.http.get("/metrics").text
        assert server.http.get("/").status_code == 200
        is_loaded.set()
        server.wait_for(lambda: server.service.is_ready)
        assert server.http.get("/health").json() == {"status": "ok"}
