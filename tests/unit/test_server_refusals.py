"""Bad requests: one clear error each, in the shape of the API that was asked, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from pipo.base.errors import EngineBusy, ReadFailed, UsageError
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running, small_prompts

PROMPTS = small_prompts()
HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(FakeEngine(PROMPTS.tokenizer, context_tokens=256), PROMPTS) as found:
        yield found


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"nonsense": 1}, "nonsense", "'nonsense' is not supported"),
        ({"functions": []}, "functions", "not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "array"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0", "'boss'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "age": 5}]}, "messages.0.age", "not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"messages": [{"role": "assistant"}]}, "messages", "neither content nor tool_calls"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": True}, "temperature", "number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 10**50}, "max_tokens", "less than"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
        ({"max_tokens": 300}, "max_tokens", "and an answer of 300 do not fit the context of 256 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, None, "does not fit the context of 256 tokens"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "17 answers are more than the 16"),
        ({"stop": ["a", 5]}, "stop.1", "string"),
        ({"stop": ""}, None, "empty string"),
        ({"seed": -5}, "seed", "greater than"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
        ({"logit_bias": {"999999": 1}}, None, "there is no token 999999"),
        ({"logit_bias": {"5": 500}}, "logit_bias.5", "less than or equal to 100"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        ({"tool_choice": "required"}, "tool_choice", "need tools"),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern", "is missing"),
        ({"response_format": {"type": "grammar", "grammar": 5}}, "response_format.grammar", "string"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "is missing",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ({"model": 5}, "model", "string"),
    ],
)
def test_a_field_that_cannot_be_used(
    server: RunningServer, fields: dict[str, Any], param: str | None, says: str
) -> None:
    reply = server.http.post(CHAT, json={"messages": HELLO} | fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"] and len(error["message"]) < 500
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5, 99999]}, "there is no token 99999"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "'suffix' is not supported"),
        ({"prompt": "x", "best_of": 2}, "'best_of' is not supported"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0, which needs echo"),
        ({"prompt": ["x"] * 9, "n": 2}, "18 answers"),
    ],
)
def test_a_completion_that_cannot_be(server: RunningServer, fields: dict[str, Any], says: str) -> None:
    reply = server.http.post(COMPLETIONS, json=fields)
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"messages": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[" * 100_000,
        b'{"a":' * 5000,
        b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/tokenize"])
def test_a_body_that_is_no_request(server: RunningServer, path: str, data: bytes) -> None:
    reply = server.http.post(path, content=data)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"nonsense": 1}, "'nonsense' is not supported"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 1000}, "do not fit the context of 256"),
        ({"temperature": 1.5}, "less than or equal to 1"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
    ],
)
def test_anthropics_errors(server: RunningServer, fields: dict[str, Any], says: str) -> None:
    body = {"model": "small", "max_tokens": 10, "messages": HELLO} | fields
    reply = server.http.post(MESSAGES, json={name: value for name, value in body.items() if value is not None})
    found = reply.json()
    assert reply.status_code == 400 and found["type"] == "error"
    assert found["error"]["type"] == "invalid_request_error" and says in found["error"]["message"]


def test_anthropics_missing_model(server: RunningServer) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'other'"):
        client.messages.create(model="other", max_tokens=5, messages=HELLO)


def test_routes_and_methods_that_there_are_not(server: RunningServer) -> None:
    assert server.http.get("/v2/models").status_code == 404
    reply = server.http.delete("/v1/models")
    assert reply.status_code == 405 and "does not take DELETE" in reply.json()["error"]["message"]
    assert server.http.get(CHAT).status_code == 405
    assert server.http.post("/v1/messages/batches", json={}).json()["type"] == "error"


def test_a_model_without_template() -> None:
    prompts = small_prompts(None)
    with running(FakeEngine(prompts.tokenizer), prompts) as server:
        reply = server.http.post(CHAT, json={"messages": HELLO})
        assert reply.status_code == 400 and "no chat template" in reply.json()["error"]["message"]
        assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at.all }}", "the chat template failed"),
        ("{% for i in range(10000000) %}x{% endfor %}", "the chat template wants"),
    ],
)
def test_a_template_that_refuses_or_fails(template: str, says: str) -> None:
    prompts = small_prompts(template)
    with running(FakeEngine(prompts.tokenizer), prompts) as server:
        reply = server.http.post(CHAT, json={"messages": HELLO})
        assert reply.status_code == 400 and says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UsageError("no such thing"), 400, "no such thing"),
        (EngineBusy("9 requests wait already"), 503, "9 requests wait"),
        (ReadFailed("gone", path="/secret", offset=0, wanted_bytes=1, got_bytes=0), 500, "the engine failed"),
        (RuntimeError("a secret"), 500, "the server has a bug (RuntimeError)"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_before_the_first_token(error: Exception, status: int, says: str, stream: bool) -> None:
    engine = FakeEngine(PROMPTS.tokenizer, error=error)
    with running(engine, PROMPTS) as server:
        reply = server.http.post(CHAT, json={"messages": HELLO, "stream": stream})
        assert reply.status_code == status and says in reply.json()["error"]["message"]
        assert "secret" not in reply.text
        assert ("retry-after" in reply.headers) == (status == 503)
        reply = server.http.post(MESSAGES, json={"model": "x"} | {"max_tokens": 9, "messages": HELLO, "model": "small"})
        assert reply.status_code == {503: 529}.get(status, status) and reply.json()["type"] == "error"
        assert engine.num_running == 0


def test_an_engine_that_fails_in_the_middle() -> None:
    error = ReadFailed("gone", path="/secret", offset=0, wanted_bytes=1, got_bytes=0)
    with running(FakeEngine(PROMPTS.tokenizer, error=error, fail_at=4), PROMPTS) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.chat.completions.create(model="small", messages=HELLO, stream=True))
        assert server.http.post(CHAT, json={"messages": HELLO}).status_code == 500
        text = server.http.post(
            MESSAGES, json={"model": "small", "max_tokens": 9, "messages": HELLO, "stream": True}
        ).text
        assert text.rstrip().splitlines()[-2] == "event: error" and "message_stop" not in text
