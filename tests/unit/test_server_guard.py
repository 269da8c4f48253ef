"""Who may ask, how much anybody may take, and what happens to those who go away, dawdle, or do not read."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from pipo.base.errors import UsageError
from pipo.server.connection import listen
from pipo.server.settings import Limits, ServerSettings
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running, small_prompts

PROMPTS = small_prompts()
HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
LONG = "word " * 400
KEY = "s3cret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One that nobody changes."""
    with running(_engine(), PROMPTS) as found:
        yield found


def _engine(**changes: Any) -> FakeEngine:
    return FakeEngine(PROMPTS.tokenizer, **{"context_tokens": 4096} | changes)


def _slow() -> FakeEngine:
    return _engine(text=LONG, delay_s=0.02)


def _request(body: dict[str, Any], **headers: str) -> bytes:
    """As it goes over the wire."""
    data = json.dumps(body).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def test_a_key_is_wanted_but_for_health_and_the_page() -> None:
    with running(_engine(), PROMPTS, api_key=KEY) as server:
        http = server.http
        assert http.get("/health").status_code == 200 and http.get("/").status_code == 200
        for path in ("/v1/models", "/stats", "/metrics", "/props", "/nowhere"):
            assert http.get(path).status_code == 401
        for headers in (
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "Bearer"},
            {"x-api-key": KEY[:-1]},
            {"x-api-key": "ü".encode()},
        ):
            reply = http.post(CHAT, json={"messages": HELLO}, headers=headers)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in reply.text
        for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
            assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("host", "is_taken"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1:1", True),
        ("[::1]:8080", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:8080@evil.example", False),
        ("", False),
    ],
)
def test_only_names_of_this_machine(server: RunningServer, host: str, is_taken: bool) -> None:
    assert (server.http.get("/health", headers={"host": host}).status_code == 200) == is_taken


def test_pages_of_other_origins_may_not_ask(server: RunningServer) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        reply = server.http.post(CHAT, json={"messages": HELLO}, headers={"origin": origin})
        assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
    own = {"origin": server.url}
    assert server.http.post(CHAT, json={"messages": HELLO}, headers=own).status_code == 200


def test_cors_opens_for_those_that_are_named() -> None:
    friend = "https://friend.example"
    with running(_engine(), PROMPTS, cors_origins=(friend,), api_key=KEY) as server:
        asked = {"origin": friend, "access-control-request-method": "POST"}
        preflight = server.http.options(CHAT, headers=asked | {"access-control-request-headers": "authorization"})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == friend
        headers = {"origin": friend, "authorization": f"Bearer {KEY}"}
        reply = server.http.post(CHAT, json={"messages": HELLO}, headers=headers)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == friend
        stranger = headers | {"origin": "https://evil.example"}
        assert server.http.post(CHAT, json={"messages": HELLO}, headers=stranger).status_code == 403


def test_a_body_that_is_too_large() -> None:
    with running(_engine(), PROMPTS, limits=Limits(max_body_bytes=2000)) as server:
        for data in (b"x" * 2001, b"x" * 7000, b"x" * 1_000_000):
            reply = server.http.post(CHAT, content=data)
            assert reply.status_code == 413 and "larger than 2.0 KiB" in reply.json()["error"]["message"]

        def chunks() -> Any:
            for _ in range(50):
                yield b"x" * 1000

        assert server.http.post(CHAT, content=chunks()).status_code == 413, "without a length"
        assert server.http.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_a_head_that_is_too_large() -> None:
    with running(_engine(), PROMPTS, limits=Limits(max_header_bytes=2000)) as server:
        assert server.http.get("/health", headers={"x-long": "y" * 1000}).status_code == 200
        with server.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx-long: " + b"y" * 5000 + b"\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 431"), "all at once"
        with server.connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx-long: " + b"y" * 5000)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400"), "before its end"


@pytest.mark.parametrize(
    ("limits", "fields", "says"),
    [
        (Limits(max_prompt_tokens=5), {}, "this server takes 5"),
        (Limits(max_tokens=7), {"max_tokens": 8}, "this server gives 7 at most"),
        (Limits(max_choices=2), {"n": 3}, "more than the 2"),
        (Limits(max_logprob_bytes=1000), {"logprobs": True, "max_tokens": 50}, "too many to keep"),
    ],
)
def test_limits_on_tokens_and_answers(limits: Limits, fields: dict[str, Any], says: str) -> None:
    with running(_engine(), PROMPTS, limits=limits) as server:
        reply = server.http.post(CHAT, json={"messages": HELLO} | fields)
        assert reply.status_code == 400 and says in reply.json()["error"]["message"]


def test_an_answer_nobody_limited_has_the_servers_limit() -> None:
    engine = _engine()
    with running(engine, PROMPTS, limits=Limits(max_tokens=7)) as server:
        assert server.http.post(CHAT, json={"messages": HELLO}).json()["choices"][0]["finish_reason"] == "length"
        assert engine.requests[-1].params.max_tokens == 7


def test_more_requests_than_may_run() -> None:
    engine = _slow()
    with running(engine, PROMPTS, limits=Limits(max_requests=2)) as server:
        with server.http.stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as first:
            assert first.status_code == 200
            with server.http.stream("POST", CHAT, json={"messages": HELLO, "stream": True}):
                reply = server.http.post(CHAT, json={"messages": HELLO})
                assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
                assert server.http.get("/health").status_code == 200
        server.wait_for(lambda: engine.num_running == 0)
        assert server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_a_request_that_takes_too_long() -> None:
    engine = _slow()
    with running(engine, PROMPTS, limits=Limits(max_request_s=0.3)) as server:
        reply = server.http.post(CHAT, json={"messages": HELLO})
        assert reply.status_code == 504 and "within 0.3 s" in reply.json()["error"]["message"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match=r"within 0\.3 s"):
            list(client.chat.completions.create(model="small", messages=HELLO, stream=True))
        server.wait_for(lambda: engine.num_running == 0)
        assert engine.num_cancelled == 2


def test_embeddings_that_take_too_long() -> None:
    engine = _engine(delay_s=1000.0)
    with running(engine, PROMPTS, limits=Limits(max_request_s=0.2)) as server:
        reply = server.http.post("/v1/embeddings", json={"input": ["a", "b"]})
        assert reply.status_code == 504 and "within 0.2 s" in reply.json()["error"]["message"]
        server.wait_for(lambda: engine.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_cancels(stream: bool) -> None:
    engine = _slow()
    with running(engine, PROMPTS) as server:
        connection = server.connect()
        connection.sendall(_request({"messages": HELLO, "stream": stream, "n": 2}))
        server.wait_for(lambda: engine.num_running == 2)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
        begin = time.monotonic()
        server.wait_for(lambda: engine.num_running == 0)
        assert engine.num_cancelled == 2 and time.monotonic() - begin < 400 * 0.02, "long before its end"


def test_who_hangs_up_while_the_queue_is_long_cancels() -> None:
    engine = _engine(delay_s=1000.0)
    with running(engine, PROMPTS) as server:
        connection = server.connect()
        connection.sendall(_request({"messages": HELLO, "stream": True}))
        server.wait_for(lambda: engine.num_running == 1)
        connection.close()
        server.wait_for(lambda: engine.num_running == 0)


@pytest.mark.parametrize("more", [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /he", b"x" * 200_000])
def test_who_sends_more_and_hangs_up_cancels(more: bytes) -> None:
    """What comes after a request is not read on by uvicorn until that is answered."""
    engine = _engine(delay_s=1000.0)
    with running(engine, PROMPTS) as server:
        connection = server.connect()
        connection.sendall(_request({"messages": HELLO}))
        server.wait_for(lambda: engine.num_running == 1)
        with suppress(ConnectionError):
            connection.sendall(more)
        time.sleep(0.05)  # it arrives by itself
        connection.close()
        server.wait_for(lambda: engine.num_running == 0)
        assert server.http.get("/health").status_code == 200


def test_requests_that_are_sent_ahead_are_answered_in_turn() -> None:
    with running(_engine(delay_s=0.001), PROMPTS) as server, server.connect() as connection:
        connection.sendall(_request({"messages": HELLO}) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        found = b"".join(iter(lambda: connection.recv(1000), b""))
        assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"200", b"200", b"404"]


def test_connections_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipo.server.connection.MOST_CONNECTIONS", 3)
    with running(_engine(), PROMPTS) as server:
        idle = [server.connect() for _ in range(3)]
        server.wait_for(lambda: len(server.server.server_state.connections) == 3)
        with server.connect() as more:
            assert more.recv(1000).startswith(b"HTTP/1.1 503") and more.recv(1000) == b""
        for connection in idle:
            connection.close()
        server.wait_for(lambda: not server.server.server_state.connections)
        assert server.http.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_who_does_not_read_is_cut_off() -> None:
    engine = _engine(text="word " * 100_000, context_tokens=10**6)
    with running(engine, PROMPTS, limits=Limits(write_timeout_s=0.3, max_body_bytes=10000)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(_request({"messages": HELLO, "stream": True}))
        server.wait_for(lambda: engine.num_running == 1)
        server.wait_for(lambda: engine.num_running == 0)
        assert engine.num_cancelled == 1
        connection.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", _request({"messages": HELLO})[:-5]])
def test_who_does_not_finish_asking_is_cut_off(sent: bytes) -> None:
    with running(_engine(), PROMPTS, limits=Limits(read_timeout_s=0.3)) as server, server.connect() as connection:
        connection.sendall(sent)
        reply = connection.recv(1000)
        assert reply == b"" or b"408" in reply.split(b"\r\n")[0]


def test_signs_of_life_on_a_stream_that_says_nothing() -> None:
    engine = _engine(text="hi", delay_s=0.5)
    with running(engine, PROMPTS, limits=Limits(ping_s=0.1)) as server:
        lines = server.http.post(CHAT, json={"messages": HELLO, "stream": True}).text.splitlines()
        assert lines[0] == ": ping" and lines.count(": ping") >= 3 and lines[-2] == "data: [DONE]"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chunks = client.chat.completions.create(model="small", messages=HELLO, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hi"
        body = {"model": "small", "max_tokens": 9, "messages": HELLO, "stream": True}
        assert "event: ping" in server.http.post("/v1/messages", json=body).text


def test_bodies_together_have_a_limit() -> None:
    with running(_engine(), PROMPTS, limits=Limits(max_body_bytes=10_000, read_timeout_s=5)) as server:
        slow = [server.connect() for _ in range(9)]
        head = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
        for connection in slow[:8]:
            connection.sendall(head + b"x" * 9998)
        server.wait_for(lambda: server.service.body_room.num_bytes == 8 * 9998)
        slow[8].sendall(head + b"x" * 9998)
        assert b"503" in slow[8].recv(1000).split(b"\r\n")[0]
        for connection in slow:
            connection.close()
        server.wait_for(lambda: server.service.body_room.num_bytes == 0)
        assert server.http.post(CHAT, json={"messages": HELLO}).status_code == 200


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_a_peer_that_is_gone_without_a_word_is_found_out() -> None:
    limits = Limits(write_timeout_s=7)
    with listen("127.0.0.1", 0, limits) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            each_s = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            assert idle_s + each_s * connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) <= 120


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0, Limits()) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on port {port} of 127.0.0.1: Address already in use"):
            listen("127.0.0.1", port, Limits())
    with pytest.raises(UsageError, match="is no address"):
        listen("no such host", 0, Limits())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]"])
def test_loopback_answers_to_its_own_names(host: str) -> None:
    settings = ServerSettings("m", host)
    assert settings.is_loopback and settings.allowed_hosts is not None
    assert {"localhost", settings.url_host} <= settings.allowed_hosts


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_are_open(host: str) -> None:
    assert not ServerSettings("m", host).is_loopback and ServerSettings("m", host).allowed_hosts is None


@pytest.mark.parametrize(
    "wrong", [{"api_key": ""}, {"api_key": "a\nb"}, {"api_key": "ü"}, {"port": 70000}, {"cors_origins": ("evil",)}]
)
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServerSettings("m", **wrong)
    with pytest.raises(UsageError):
        Limits(ping_s=0)


def test_connections_that_stay_are_used_again() -> None:
    limits = Limits(read_timeout_s=0.5)
    with running(_engine(), PROMPTS, limits=limits) as server, httpx.Client(base_url=server.url) as http:
        for _ in range(4):
            assert http.post(CHAT, json={"messages": HELLO}).status_code == 200
            time.sleep(0.3)  # together longer than a request may take to arrive
