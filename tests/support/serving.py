"""A server on a free port of this machine, in a thread: what clients reach is the real uvicorn."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from pipo.base.errors import PipoError
from pipo.server.connection import listen
from pipo.server.prompts import Prompts
from pipo.server.run import Server, serve_with
from pipo.server.service import Service
from pipo.server.settings import Limits, ServerSettings
from pipo.serving.contract import ServedEngine
from pipo.text.chat_template import ChatTemplate
from pipo.text.tokenizer import Tokenizer
from tests.support.vocabularies import byte_pair_metadata

WAIT_S = 20.0
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'boss' %}{{ raise_exception('no boss') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "({{ c.function.arguments | tojson }})]{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def small_prompts(template: str | None = TEMPLATE) -> Prompts:
    """A real tokenizer with a small vocabulary, and a template."""
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata())
    return Prompts(tokenizer, None if template is None else ChatTemplate(template, None, None), template or "")


@dataclass(slots=True)
class RunningServer:
    service: Service
    server: Server
    port: int
    thread: threading.Thread
    error: Exception | None = None  # that it ended with

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_S)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def call(self, function: Callable[[], None]) -> None:
        """In the server's event loop."""
        self.server.loop.call_soon_threadsafe(function)

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, "it did not come to be so"
            time.sleep(0.01)


async def _ready(client: ServedEngine) -> ServedEngine:
    return client


@contextmanager
def running(
    client: ServedEngine,
    prompts: Prompts,
    *,
    limits: Limits | None = None,
    open_engine: Callable[[Callable[[str, float], None]], Awaitable[ServedEngine]] | None = None,
    api_key: str | None = None,
    cors_origins: tuple[str, ...] = (),
    host: str = "127.0.0.1",
) -> Iterator[RunningServer]:
    """Serves `client`, at once or as `open_engine` gives it."""
    settings = ServerSettings("small", host, 0, api_key, cors_origins, limits or Limits())
    service = Service(settings, prompts)
    server = Server(service)
    listener = listen(host, 0, settings.limits)
    opening = open_engine or (lambda progress: _ready(client))

    def serve() -> None:
        try:
            asyncio.run(serve_with(server, service, listener, opening))
        except PipoError as error:
            found.error = error

    found = RunningServer(service, server, listener.getsockname()[1], threading.Thread(target=serve))
    thread = found.thread
    thread.start()
    try:
        found.wait_for(lambda: server.started and (service.is_ready or open_engine is not None))
        yield found
    finally:
        server.end()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server ends"
