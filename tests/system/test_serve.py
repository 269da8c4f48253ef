"""`pipo serve` as a user runs it: SmolLM2 behind both client libraries, from the first line to the last signal."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.support.command_line import TIMEOUT_S, CommandLine
from tests.support.server_process import Served, serving

HELLO = [{"role": "user", "content": "Say hello."}]
SERVE = ("serve", "smollm2", "--port", "0", "-c", "512", "--ram", "400MB")


@pytest.fixture(scope="module")
def served(pipo: CommandLine) -> Iterator[Served]:
    with serving(pipo, *SERVE) as found:
        yield found


def test_the_plan_comes_before_the_address(served: Served) -> None:
    text = "".join(served.said)
    for word in ("weights", "memory", "context", "512 tokens"):
        assert word in text
    assert served.said[-1].startswith("serving smollm2 at http://127.0.0.1:")


def test_answers_are_those_of_run(served: Served, pipo: CommandLine) -> None:
    arguments = ("run", "smollm2", "Say hello.", "--temp", "0", "-n", "12", "-c", "512")
    want = pipo(*arguments).out.removesuffix("\n")
    whole = served.openai.chat.completions.create(model="smollm2", messages=HELLO, temperature=0, max_tokens=12)
    assert whole.choices[0].message.content == want
    stream = served.openai.chat.completions.create(
        model="smollm2", messages=HELLO, temperature=0, max_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == want
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    with client.messages.stream(
        model="smollm2", max_tokens=12, messages=HELLO, extra_body={"temperature": 0}
    ) as events:
        message = events.get_final_message()
    assert message.content[0].type == "text" and message.content[0].text == want
    assert message.usage.cache_read_input_tokens, "the prompt was there already"


def test_a_seed_repeats_an_answer(served: Served) -> None:
    def answer() -> str | None:
        reply = served.openai.chat.completions.create(model="smollm2", messages=HELLO, seed=5, max_tokens=10)
        return reply.choices[0].message.content

    assert answer() == answer()


def test_requests_at_the_same_time_wait_for_each_other(served: Served) -> None:
    texts: list[str] = []

    def ask() -> None:
        reply = served.openai.completions.create(
            model="smollm2", prompt="The capital of France is", max_tokens=4, temperature=0
        )
        texts.append(reply.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(texts) == 4 and len(set(texts)) == 1 and "Paris" in texts[0]


def test_who_goes_away_stops_the_engine(served: Served) -> None:
    stream = served.openai.completions.create(
        model="smollm2", prompt="1, 2, 3,", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + TIMEOUT_S
    while httpx.get(f"{served.url}/stats").json()["engine"]["num_running"]:
        assert time.monotonic() < deadline
    after = httpx.get(f"{served.url}/stats").json()["engine"]["completion_tokens"]
    assert served.openai.completions.create(model="smollm2", prompt="x", max_tokens=1).choices
    assert after < 400


def test_stats_and_metrics_tell_of_the_engine(served: Served) -> None:
    stats = httpx.get(f"{served.url}/stats").json()
    assert stats["engine"]["num_passes"] > 10 and stats["engine"]["completion_tokens"] > 10
    assert stats["engine"]["ledger"]["KV cache"] > 0 and stats["engine"]["limit_bytes"] == 400_000_000
    assert 0 < stats["engine"]["peak_bytes"] <= 400_000_000
    assert stats["info"]["plan"]["plan"]["context_tokens"] == 512
    text = httpx.get(f"{served.url}/metrics").text
    assert 'pipo_ledger_bytes{name="KV cache"}' in text and "pipo_tpot_seconds_bucket" in text


def test_what_this_engine_cannot_is_said(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="do not fit the context of 512 tokens"):
        served.openai.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=1000)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_tells_who_waits(pipo: CommandLine, number: int, code: int) -> None:
    with serving(pipo, *SERVE) as served:
        stream = served.openai.completions.create(
            model="smollm2", prompt="1, 2, 3,", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        found, seconds = served.end(number)
        assert found == code
        assert seconds < 10, "nothing hangs; it takes under two seconds on a machine that has nothing else to do"
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(chunks)


def test_a_port_that_is_taken(pipo: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = pipo("serve", "smollm2", "--port", str(taken.getsockname()[1]))
    assert ended.code == 2 and "Address already in use" in ended.err and "--port 0" in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("smollm2", "--ram", "60MB"), "the smallest --ram"),
        (("nosuchmodel",), "nosuchmodel"),
        (("smollm2", "--api-key", ""), "not empty"),
        (("smollm2", "--host", "no.such.host.invalid"), "is no address"),
        (("smollm2", "--max-body", "lots"), "--max-body"),
        (("smollm2", "--ping-interval", "0"), "--ping-interval must be more than 0"),
        (("smollm2", "--cors-origin", "evil"), "is no origin"),
    ],
)
def test_what_cannot_be_served(pipo: CommandLine, arguments: tuple[str, ...], says: str) -> None:
    ended = pipo("serve", *arguments, "--port", "0")
    assert ended.code in (1, 2) and says in ended.err and "Traceback" not in ended.err


def test_a_key_from_the_environment_and_a_warning_without_one(pipo: CommandLine) -> None:
    keyed = CommandLine({**pipo.environment, "PIPO_API_KEY": "s3cret"})
    with serving(keyed, *SERVE, "--host", "0.0.0.0") as served:
        assert "anybody" not in "".join(served.said)
        port = served.url.rpartition(":")[2]
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        key = {"authorization": "Bearer s3cret"}
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=key).status_code == 200
    with serving(pipo, *SERVE, "--host", "0.0.0.0") as served:
        assert "anybody who reaches 0.0.0.0 can use this server" in "".join(served.said)
