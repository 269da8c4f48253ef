"""A stand-in for `pipo serve`: the page's files, /stats that move, answers whose pieces a test hands out one by one."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import Any

from tests.support.browser import Tab

CSP = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
MIB = 1 << 20
DRIVE_BYTES_PER_S = 4.0e9
WEIGHT_BYTES, STREAMED_BYTES, LIMIT_BYTES = 92 * MIB, 61 * MIB, 119 * MIB
LEDGER = {
    "resident weights": 29 * MIB,
    "slots": 9 * MIB,
    "KV cache": 11 * MIB,
    "activations": 4 * MIB,
    "process": 60 * MIB,
}
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
END = object()


@dataclass
class Answer:
    """One request for an answer. A test says its pieces; `gone` is set once the page has hung up."""

    body: dict[str, Any]
    authorization: str | None
    pieces: Queue[object] = field(default_factory=Queue)
    gone: Event = field(default_factory=Event)

    def say(self, *texts: str) -> None:
        for text in texts:
            self.pieces.put({"content": text})

    def think(self, *texts: str) -> None:
        for text in texts:
            self.pieces.put({"reasoning_content": text})

    def fail(self, words: str) -> None:
        self.pieces.put({"error": words})

    def end(self) -> None:
        self.pieces.put(END)


@dataclass
class State:
    """`refusals` answer requests one after another: (status, message). `key` is what a request must bring."""

    refusals: list[tuple[int, str]] = field(default_factory=list)
    key: str | None = None
    loading: str = ""  # what /stats says while there is no engine yet
    answers: Queue[Answer] = field(default_factory=Queue)
    paths: list[str] = field(default_factory=list)
    closing: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    counters: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    device: dict[str, object] | None = None
    units: list[dict[str, object]] = field(default_factory=lambda: units_of(30, resident=(0, 13, 34, 60)))

    def count(self, **amounts: float) -> None:
        with self.lock:
            for name, amount in amounts.items():
                self.counters[name] = self.counters.get(name, 0) + amount

    def pass_of_one(self) -> None:
        """A token's worth of work."""
        self.count(num_passes=1, bytes_read=STREAMED_BYTES, completion_tokens=1)
        self.count(compute_s=0.02, wall_s=0.04, disk=0.012, queue=0.004)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = State()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_answer(self) -> Answer:
        return self.state.answers.get(timeout=20)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is what is tested."""


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.state.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def asked(tab: Tab, server: Server, text: str = "hello", answer: str = "Good day.") -> None:
    """One question and its whole answer."""
    tab.ask(text)
    request = server.next_answer()
    request.say(answer)
    request.end()
    tab.wait_for_words(answer)
    tab.wait_for_end()


@contextmanager
def fed(server: Server, num_words: int = 150, word_s: float = 0.02) -> Iterator[None]:
    """Meanwhile every request is answered with so many words, slowly."""
    closing = Event()

    def feed() -> None:
        while not closing.is_set():
            with suppress(Empty):
                answer = server.state.answers.get(timeout=0.05)
                Thread(target=talk, args=(answer,), daemon=True).start()

    def talk(answer: Answer) -> None:
        for i in range(num_words):
            answer.say(f"word{i} ")
            if closing.wait(word_s):
                return
        answer.end()

    thread = Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def state(self) -> State:
        return self.server.state

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.state.paths.append(self.path)
        if self.path == "/":
            self.send_static("index.html")
        elif self.path.startswith("/static/"):
            self.send_static(self.path.removeprefix("/static/"))
        elif not self.has_key():
            self.refuse(401, "Wrong or missing API key: send `Authorization: Bearer …`.")
        elif self.path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [{"id": "smollm2", "object": "model"}]})
        elif self.path == "/props":
            self.send_json(200, {"default_generation_settings": {"params": DEFAULTS}})
        elif self.path == "/stats" and self.state.loading:
            self.refuse(503, self.state.loading)
        elif self.path == "/stats":
            self.send_json(200, stats_of(self.state))
        else:
            self.refuse(404, f"There is no {self.path}.")

    def do_POST(self) -> None:
        self.state.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.has_key():
            self.refuse(401, "Wrong or missing API key: send `Authorization: Bearer …`.")
        elif self.state.refusals:
            self.refuse(*self.state.refusals.pop(0))
        else:
            self.stream(Answer(body, self.headers.get("Authorization")))

    def has_key(self) -> bool:
        return self.state.key is None or self.headers.get("Authorization") == f"Bearer {self.state.key}"

    def send_static(self, name: str) -> None:
        file = files("pipo.server") / "static" / name
        if "/" in name or not file.is_file():
            self.refuse(404, f"There is no {name}.")
        else:
            self.send_body(200, TYPES[name.rsplit(".", 1)[-1]], file.read_bytes())

    def refuse(self, status: int, words: str) -> None:
        self.send_json(status, {"error": {"message": words, "type": "invalid_request_error", "code": None}})

    def send_json(self, status: int, value: object) -> None:
        self.send_body(status, "application/json", json.dumps(value).encode())

    def send_body(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.state.count(running=1, prompt_tokens=20)
        self.state.answers.put(answer)
        try:
            self.send_pieces(answer)
        finally:
            self.state.count(running=-1)

    def send_pieces(self, answer: Answer) -> None:
        num_tokens = 0
        while not self.state.closing.is_set():
            piece = self.next_piece(answer)
            if piece is None:
                return
            if piece is END:
                self.send_end(num_tokens)
                return
            if "error" in piece:
                self.send_event({"error": {"message": piece["error"]}})
                return
            self.state.pass_of_one()
            num_tokens += 1
            self.send_event({"choices": [{"index": 0, "delta": piece, "finish_reason": None}]})

    def next_piece(self, answer: Answer) -> Any:
        """None once the other side has hung up."""
        while not self.state.closing.is_set():
            try:
                return answer.pieces.get(timeout=0.02)
            except Empty:
                if has_hung_up(self.connection):
                    answer.gone.set()
                    return None
        return None

    def send_end(self, num_tokens: int) -> None:
        self.send_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 20, "completion_tokens": num_tokens, "total_tokens": 20 + num_tokens}
        self.send_event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, value: object) -> None:
        self.wfile.write(f": a comment\ndata: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def has_hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def stats_of(state: State) -> dict[str, object]:
    with state.lock:
        counters = dict(state.counters)
    now = time.time()
    names = ("num_passes", "bytes_read", "completion_tokens", "prompt_tokens", "compute_s", "wall_s")
    engine = {name: counters.get(name, 0) for name in names} | {
        "num_waiting": int(counters.get("waiting", 0)),
        "num_running": int(counters.get("running", 0)),
        "num_unread": int(counters.get("unread", 0)),
        "cached_tokens": 0,
        "stall_s": {cause: counters.get(cause, 0.0) for cause in ("queue", "disk", "repack", "copy")},
        "ledger": LEDGER,
        "limit_bytes": LIMIT_BYTES,
        "anonymous_bytes": 101 * MIB,
        "peak_bytes": 104 * MIB,
    }
    info = {"model": "smollm2", "context_tokens": 512, "num_sequences": 4, "limit_bytes": LIMIT_BYTES, "adapters": []}
    stats = {"model": "smollm2", "uptime_s": now - state.started, "engine": engine, "now": now}
    return stats | {"info": info | {"plan": plan_of(state.units, state.device) if state.units else {}}}


def plan_of(units: list[dict[str, object]], device: dict[str, object] | None = None) -> dict[str, object]:
    """What `pipo plan --json` says, in its shape; what the page does not read is left out."""
    return {
        "machine": {"name": "a machine", "source": "measured 2026-11-29"},
        "workload": {"prompt_tokens": 256, "answer_tokens": 256, "num_sequences": 1},
        "plan": {
            "limit_bytes": LIMIT_BYTES,
            "breakdown_bytes": LEDGER,
            "weight_bytes": WEIGHT_BYTES,
            "streamed_bytes_per_pass": STREAMED_BYTES,
            "drive_bytes_per_s": DRIVE_BYTES_PER_S,
            "units": units,
            "device": device,
        },
        "prediction": {"tokens_per_s": 22.7, "limit": {"lane": "cpu", "text": "the CPU, which computes"}},
        "what_would_help": [
            {"what": "2 sequences at a time instead of 1", "tokens_per_s": 38.6, "gain": 0.7},
            {"what": "a CPU twice as fast", "tokens_per_s": 24.4, "gain": 0.07},
        ],
    }


def units_of(num_blocks: int, resident: tuple[int, ...]) -> list[dict[str, object]]:
    names = [(stage, block) for block in range(num_blocks) for stage in ("attention", "mlp")]
    return [
        {"stage": stage, "block": block, "home": "ram" if i in resident else "disk", "until_context_fills": i == 34}
        for i, (stage, block) in enumerate([*names, ("head", None)])
    ]
