"""A server from its first connection to its last: it answers /health while the model is loaded."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from pipo.server.app import make_app
from pipo.server.connection import protocol_with
from pipo.server.service import Service
from pipo.server.settings import Limits
from pipo.serving.contract import EngineClient

Progress = Callable[[str, float], None]
OpenEngine = Callable[[Progress], Awaitable[EngineClient]]
_GRACE_S = 1  # for what is running to be told, and to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    service: Service, listener: socket.socket, open_engine: OpenEngine, on_ready: Callable[[EngineClient], None]
) -> None:
    """Serve on `listener` until a signal, which is raised again once everything is closed.

    `open_engine(progress)` is awaited while /health is answered already; `on_ready` is called when it is there.
    Raises what `open_engine` raises. Threads: the main one.
    """
    server = Server(service)
    asyncio.run(serve_with(server, service, listener, open_engine, on_ready))
    if server.signal is not None:
        signal.raise_signal(server.signal)


async def serve_with(
    server: Server,
    service: Service,
    listener: socket.socket,
    open_engine: OpenEngine,
    on_ready: Callable[[EngineClient], None] = lambda client: None,
) -> None:
    """Until `server.end` is called. Raises what `open_engine` raises."""
    serving = asyncio.ensure_future(server.serve([listener]))
    loading = asyncio.ensure_future(_load(service, open_engine, on_ready))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is not None:
            server.should_exit = True
        await serving
        if loading.done():
            loading.result()
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await service.close()


async def _load(service: Service, open_engine: OpenEngine, on_ready: Callable[[EngineClient], None]) -> None:
    def progress(step: str, fraction: float) -> None:
        service.progress = (step, fraction)

    client = await open_engine(progress)
    service.ready(client)
    on_ready(client)


def _config(service: Service) -> uvicorn.Config:
    limits: Limits = service.settings.limits
    return uvicorn.Config(
        make_app(service),
        loop="asyncio",
        http=protocol_with(limits),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=limits.max_header_bytes,
    )


class Server(uvicorn.Server):
    """Tells running requests at the first signal; later ones change nothing. `signal` is the one that came."""

    def __init__(self, service: Service) -> None:
        super().__init__(_config(service))
        self.signal: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._service = service
        self._log = logging.getLogger("uvicorn")
        self._log.setLevel(logging.ERROR)  # strangers' nonsense is not worth a line each

    def end(self) -> None:
        """From any thread, and from a signal's handler."""
        self.should_exit = True
        self._log.setLevel(logging.CRITICAL)  # that running tasks are cancelled is what was asked for
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._service.stop)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            self.signal = self.signal or number
            self.end()

        before = {number: signal.signal(number, end) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
