"""Connections that do not behave: those that say nothing, and those that do not read what they asked for."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipo.base.errors import UsageError
from pipo.server.settings import MOST_CONNECTIONS, Limits

SEND_BUFFER_BYTES = 64 << 10  # in the kernel: more would hide for long that nobody reads
_KEEPALIVE_S, _KEEPALIVE_PROBES = 15, 4
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def listen(host: str, port: int, limits: Limits) -> socket.socket:
    """A listening socket. Raises UsageError where the address is taken or none of this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r:.80} is no address: {error}", hint="127.0.0.1, ::1 or 0.0.0.0") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # over connections that linger, no other server
        _watch_peers(listener, limits)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on port {port} of {host}: {error.strerror}", hint="--port 0 takes a port that is free"
        ) from error
    return listener


def _watch_peers(listener: socket.socket, limits: Limits) -> None:
    """Connections inherit it: what is not acknowledged in time, or a peer that is gone, ends them."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_USER_TIMEOUT": int(limits.write_timeout_s * 1000),
        "TCP_KEEPIDLE": _KEEPALIVE_S,
        "TCP_KEEPINTVL": _KEEPALIVE_S,
        "TCP_KEEPCNT": _KEEPALIVE_PROBES,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has all of them
            with suppress(OSError):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def protocol_with(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP with two more time limits: for a request's head to arrive, and for what was written to be read;
    with a limit of connections; and with an ear for the client while a request is answered.
    """

    class Protocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._reading: asyncio.TimerHandle | None = None
            self._writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            super().connection_made(transport)
            if len(self.connections) > MOST_CONNECTIONS:
                transport.write(_FULL)
                transport.close()
                return
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            if self._reading is None and self.cycle is not None and self.cycle.response_complete:
                self._expect_head()  # of the next request on this connection
            super().data_received(data)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._stop_reading_timer()
            if self.conn.their_state is h11.DONE and self.cycle is not None and not self.cycle.response_complete:
                self._go_on_reading()

        def _go_on_reading(self) -> None:
            """What comes after a request waits until that is answered. uvicorn reads no more of it then, and would not
            see that the client hangs up.
            """
            waiting, _ = self.conn.trailing_data
            if len(waiting) > limits.max_header_bytes:
                self.transport.abort()
            elif waiting:
                self.flow.resume_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_reading_timer()
            self._stop_writing_timer()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(limits.write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_writing_timer()
            super().resume_writing()

        def _expect_head(self) -> None:
            self._reading = self.loop.call_later(limits.read_timeout_s, self.transport.abort)

        def _stop_reading_timer(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
            self._reading = None

        def _stop_writing_timer(self) -> None:
            if self._writing is not None:
                self._writing.cancel()
            self._writing = None

    return Protocol
