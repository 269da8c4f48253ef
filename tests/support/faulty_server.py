"""A web server on 127.0.0.1 that serves one file, badly on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

Fault = Callable[["Handler"], None]


class FaultyServer(ThreadingHTTPServer):
    """Answers each request with the next of `faults`, then with the last one for ever; `ranges` are those asked for."""

    daemon_threads = True

    def __init__(self, data: bytes, *faults: Fault) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.faults = list(faults) or [serve]
        self.ranges: list[str | None] = []
        self.closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        faults = self.server.faults
        self.server.ranges.append(self.headers.get("Range"))
        (faults.pop(0) if len(faults) > 1 else faults[0])(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def start(self) -> int:
        return int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])

    def send(self, status: int, body: bytes, *, num_bytes: int | None = None, **headers: str) -> None:
        """A body that may be shorter than the `num_bytes` announced."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if num_bytes is None else num_bytes))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_range(self, body: bytes) -> None:
        """What is left of `body` from the offset asked for, as a server with ranges does."""
        if self.start == 0:
            self.send(200, body)
        elif self.start >= len(body):
            self.send(416, b"")
        else:
            content_range = f"bytes {self.start}-{len(body) - 1}/{len(body)}"
            self.send(206, body[self.start :], Content_Range=content_range)


@contextmanager
def running(server: FaultyServer) -> Iterator[FaultyServer]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def serve(handler: Handler) -> None:
    handler.send_range(handler.server.data)


def serve_corrupt(handler: Handler) -> None:
    data = bytearray(handler.server.data)
    data[len(data) // 2] ^= 1
    handler.send_range(bytes(data))


def serve_longer(handler: Handler) -> None:
    handler.send_range(handler.server.data + b"more")


def serve_longer_unannounced(handler: Handler) -> None:
    """No Content-Length: the end of the connection is the end of the file."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(handler.server.data + b"more")


def ignore_range(handler: Handler) -> None:
    handler.send(200, handler.server.data)


def send_other_range(handler: Handler) -> None:
    size = len(handler.server.data)
    handler.send(206, handler.server.data, Content_Range=f"bytes 0-{size - 1}/{size}")


def drop_after(num_bytes: int) -> Fault:
    """Announce everything left, send only this much, and hang up."""

    def fault(handler: Handler) -> None:
        rest = handler.server.data[handler.start :]
        size = len(handler.server.data)
        content_range = f"bytes {handler.start}-{size - 1}/{size}"
        status = 206 if handler.start else 200
        handler.send(status, rest[:num_bytes], num_bytes=len(rest), Content_Range=content_range)

    return fault


def hang_up(handler: Handler) -> None:
    handler.connection.close()


def say_nothing(handler: Handler) -> None:
    handler.server.closing.wait(10)


def status(code: int) -> Fault:
    return lambda handler: handler.send(code, b"<html>sorry</html>")
