"""`pipo serve` as a user runs it: SmolLM2 behind both client libraries, from the first line to the last signal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import numpy as np
import numpy.typing as npt
import openai
import pytest

import pipo as pipo_api
from tests.support.command_line import TIMEOUT_S, CommandLine
from tests.support.engine_process import exists
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


def test_prompts_are_scored_as_a_harness_asks(served: Served, smollm2_path: Path) -> None:
    """Several at once, beside answers to others; the oracle makes all logits of a text in one process."""
    texts = ["The capital of France is Paris.", "Oceans are made of water and salt, mostly of water.", "x"]
    with pipo_api.load(smollm2_path, ram=2_000_000_000, context_tokens=512) as engine:
        prompts = [engine.encode(text) for text in texts]
        want = [_scores(engine.logits(prompt), prompt) for prompt in prompts]
    beside = served.openai.completions.create(
        model="smollm2", prompt="1, 2, 3,", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    reply = served.openai.completions.create(
        model="smollm2", prompt=prompts, echo=True, logprobs=2, max_tokens=1, seed=1234, temperature=0
    )
    assert len(list(beside)) >= 40
    for choice, prompt, text, scores in zip(reply.choices, prompts, texts, want, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
        assert choice.text.startswith(text) and len(logprobs.token_logprobs) == len(prompt) + 1
        first, *found = logprobs.token_logprobs[:-1]
        assert first is None and found == pytest.approx(scores, abs=1e-3), "2e-8 measured"
        for logprob, top in zip(found, logprobs.top_logprobs[1:-1], strict=True):
            assert len(top) == 2 and max(top.values()) >= logprob


def _scores(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    wide = logits[:-1].astype(np.float64)
    totals = np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)) + wide.max(axis=1)
    return list(wide[np.arange(len(wide)), tokens[1:]] - totals)


def test_answers_of_a_given_form_share_passes(served: Served) -> None:
    """A schema, a regex, a grammar and none at all, at the same time."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    formats: dict[str, Any] = {
        "schema": {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}},
        "object": {"type": "json_object"},
        "regex": {"type": "regex", "pattern": r"(Yes|No), [a-z]{3,9}\."},
        "grammar": {"type": "grammar", "grammar": 'start: "it is " ("so" | "not so")'},
        "free": {"type": "text"},
    }
    found: dict[str, tuple[str, str]] = {}

    def ask(name: str) -> None:
        reply = served.openai.chat.completions.create(
            model="smollm2", messages=HELLO, max_tokens=120, seed=1, response_format=formats[name]
        )
        found[name] = reply.choices[0].message.content or "", reply.choices[0].finish_reason

    threads = [threading.Thread(target=ask, args=(name,)) for name in formats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    text, finish = found["schema"]
    assert finish == "stop"
    jsonschema.validate(json.loads(text), schema)
    assert found["object"][1] == "length" or isinstance(json.loads(found["object"][0]), dict)
    assert re.fullmatch(r"(Yes|No), [a-z]{3,9}\.", found["regex"][0])
    assert found["grammar"][0] in ("it is so", "it is not so") and found["free"][0]


def test_a_tool_that_must_be_called_is(served: Served) -> None:
    city = {"type": "string", "maxLength": 12}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    reply = served.openai.chat.completions.create(
        model="smollm2", messages=asked, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), schema)
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    with client.messages.stream(
        model="smollm2",
        max_tokens=100,
        messages=asked,
        tools=[{"name": "weather", "input_schema": schema}],
        tool_choice=choice,
    ) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    assert message.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "weather"
    jsonschema.validate(block.input, schema)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"type": "regex", "pattern": "(a"}, "the regex cannot be used"),
        ({"type": "grammar", "grammar": "start: nowhere"}, "the grammar cannot be used"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}, "Invalid type: frob"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "file:///etc/passwd"}}}, "not fetch"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_is_none_is_refused(served: Served, wanted: Any, says: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        served.openai.chat.completions.create(model="smollm2", messages=HELLO, response_format=wanted, stream=stream)


def test_only_what_changed_of_several_conversations_is_computed(served: Served) -> None:
    """Two at a time, in turn; then the end of a system prompt changes."""
    rules = "Answer briefly. " * 20
    talks = [[{"role": "system", "content": rules}, {"role": "user", "content": f"Talk {i} begins."}] for i in "ab"]
    for turn in range(3):
        for talk in talks:
            reply = served.openai.chat.completions.create(
                model="smollm2", messages=talk, max_tokens=4, extra_body={"ignore_eos": True}
            )
            assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
            computed = reply.usage.prompt_tokens - (reply.usage.prompt_tokens_details.cached_tokens or 0)
            assert turn == 0 or computed < 30, "the last answer's end, the new message and the markers around them"
            answer = reply.choices[0].message.content or ""
            talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
    changed = [{"role": "system", "content": rules + "Rhyme."}, {"role": "user", "content": "Talk c begins."}]
    reply = served.openai.chat.completions.create(model="smollm2", messages=changed, max_tokens=1)
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens - (reply.usage.prompt_tokens_details.cached_tokens or 0) < 20


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


def test_what_the_guide_asks_a_server_is_answered(served: Served) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "server.md").read_text()
    blocks = re.findall(r"^(?:    .*\n)+", guide, re.MULTILINE)
    programs = [textwrap.dedent(block) for block in blocks if "http://127.0.0.1:8080" in block]
    curl, *clients = [program.replace("http://127.0.0.1:8080", served.url) for program in programs]
    assert "data: [DONE]" in subprocess.check_output([*shlex.split(curl), "-sS"], text=True)
    assert len(clients) == 2
    for client in clients:
        exec(compile(client, "docs/guide/server.md", "exec"), {})


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_and_tells_who_waits(pipo: CommandLine, number: int, code: int) -> None:
    with serving(pipo, *SERVE) as served:
        stream = served.openai.completions.create(
            model="smollm2", prompt="1, 2, 3,", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        engine = served.engine_id
        found, seconds = served.end(number)
        assert found == code and not exists(engine)
        assert seconds < 10, "nothing hangs; it takes under two seconds on a machine that has nothing else to do"
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(chunks)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_second_signal_ends_an_engine_that_is_stuck(pipo: CommandLine, number: int, code: int) -> None:
    with serving(pipo, *SERVE) as served:
        engine = served.engine_id
        os.kill(engine, signal.SIGSTOP)  # as one whose read never comes back
        served.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            served.process.wait(2)
        assert served.end(number)[0] == code and not exists(engine)


def test_an_engine_that_is_killed_ends_the_server_which_says_why(pipo: CommandLine) -> None:
    with serving(pipo, *SERVE) as served:
        stream = served.openai.completions.create(
            model="smollm2", prompt="1, 2, 3,", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        os.kill(served.engine_id, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"has ended \(signal SIGKILL\); this server ends with it"):
            list(chunks)
        assert served.process.wait(TIMEOUT_S) == 1
        served.reading.join(TIMEOUT_S)
        assert "error: the engine's process has ended (signal SIGKILL)" in "".join(served.said)


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
