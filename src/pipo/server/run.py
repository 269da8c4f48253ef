"""A server from its first connection to its last: it answers /health while the model is loaded."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from pipo.server.app import make_app
from pipo.server.connection import protocol_with
from pipo.server.service import Service
from pipo.server.settings import Limits
from pipo.serving.contract import ServedEngine

Progress = Callable[[str, float], None]
OpenEngine = Callable[[Progress], Awaitable[ServedEngine]]
OnReady = Callable[[ServedEngine], None]
_GRACE_S = 1  # for what is running to be told, and to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(service: Service, listener: socket.socket, open_engine: OpenEngine, on_ready: OnReady) -> None:
    """Serve on `listener` until a signal, or until the engine has ended of itself.

    `open_engine(progress)` is awaited while /health is answered already; `on_ready` is called when it is there.
    A second signal kills an engine that takes its time. Raises what `open_engine` raises, what the engine ended with,
    KeyboardInterrupt where it was Ctrl-C that ended everything. Threads: the main one.
    """
    server = Server(service)
    with server.heeding_signals():
        asyncio.run(serve_with(server, service, listener, open_engine, on_ready))
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


async def serve_with(
    server: Server,
    service: Service,
    listener: socket.socket,
    open_engine: OpenEngine,
    on_ready: OnReady = lambda client: None,
) -> None:
    """Until `server.end` is called. Raises what `open_engine` raises, and what the engine ended with."""
    serving = asyncio.ensure_future(server.serve([listener]))
    engine = asyncio.ensure_future(_run_engine(service, open_engine, on_ready))
    try:
        await asyncio.wait({serving, engine}, return_when=asyncio.FIRST_COMPLETED)
        was_asked = server.should_exit
        server.end()
        await serving
        if engine.done() and not was_asked:
            engine.result()
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        await service.close()


async def _run_engine(service: Service, open_engine: OpenEngine, on_ready: OnReady) -> None:
    """Until it has ended, which is always an error: a server that is to end cancels this first."""

    def progress(step: str, fraction: float) -> None:
        service.progress = (step, fraction)

    client = await open_engine(progress)
    service.ready(client)
    on_ready(client)
    error = await client.ended()
    service.stop(error)
    raise error


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
    """Tells running requests at the first signal, and waits for no engine at later ones. `signal` is the first."""

    def __init__(self, service: Service) -> None:
        super().__init__(_config(service))
        self.signal: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._killing: asyncio.Future[None] | None = None
        self._service = service
        self._log = logging.getLogger("uvicorn")
        self._log.setLevel(logging.ERROR)  # strangers' nonsense is not worth a line each

    def end(self) -> None:
        """From any thread, and from a signal's handler."""
        self.should_exit = True
        self._log.setLevel(logging.CRITICAL)  # that running tasks are cancelled is what was asked for
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._service.stop)

    def kill(self) -> None:
        """As `end`; nor is the engine waited for."""
        self.end()
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._begin_killing)

    def _begin_killing(self) -> None:
        self._killing = asyncio.ensure_future(self._service.kill())

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's, which has none to catch. The loop is there now."""
        self.loop = asyncio.get_running_loop()
        yield

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """In the main thread, until everything is closed."""

        def end(number: int, frame: FrameType | None) -> None:
            if self.signal is None:
                self.signal = number
                self.end()
            else:
                self.kill()

        before = {number: signal.signal(number, end) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
