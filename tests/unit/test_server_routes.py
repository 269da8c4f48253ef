"""What clients hear: both client libraries against a real uvicorn, over an engine that computes by arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support.fake_engine import FakeEngine, answer_text
from tests.support.serving import RunningServer, running, small_prompts

PROMPTS = small_prompts()
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(PROMPTS.tokenizer, adapters=("style",))


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[RunningServer]:
    with running(engine, PROMPTS) as found:
        yield found


@pytest.fixture(scope="module")
def openai_client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def _said(engine: FakeEngine) -> str:
    """The answer to the last request."""
    return answer_text(list(engine.requests[-1].prompt))


def test_chat_whole(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    reply = openai_client.chat.completions.create(model="small", messages=HELLO)
    assert reply.choices[0].message.content == _said(engine) and reply.choices[0].finish_reason == "stop"
    prompt = engine.requests[-1].prompt
    assert PROMPTS.tokenizer.decode(prompt) == "<user>hello</><assistant>"
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.prompt_tokens_details.cached_tokens == len(prompt) // 2
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.system_fingerprint and reply.system_fingerprint.startswith("fp_")


def test_chat_streamed_is_the_same(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    stream = openai_client.chat.completions.create(
        model="small", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == _said(engine)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5 and all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done_and_has_no_usage_unasked(server: RunningServer) -> None:
    text = server.http.post("/chat/completions", json={"messages": HELLO, "stream": True}).text
    assert text.endswith("data: [DONE]\n\n") and "usage" not in text
    assert all(line.startswith("data: ") for line in text.splitlines() if line)


def test_several_answers_each_with_its_seed(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    reply = openai_client.chat.completions.create(model="small", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert sorted(request.params.seed or 0 for request in engine.requests[-3:]) == [7, 8, 9]
    assert reply.usage is not None and reply.usage.prompt_tokens == len(engine.requests[-1].prompt)
    stream = openai_client.chat.completions.create(model="small", messages=HELLO, n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [_said(engine)] * 2


def test_parameters_reach_the_engine(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.2, "repeat_last_n": 32, "ignore_eos": False}
    openai_client.chat.completions.create(
        model="small",
        messages=HELLO,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        max_completion_tokens=9,
        stop=["sum", "zzz"],
        seed=3,
        logit_bias={"17": -100},
        user="someone",
        extra_body=extra,
    )
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.25, 0.5, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repeat_penalty) == (0.5, -0.5, 1.2)
    assert (params.max_tokens, params.stop, params.seed, params.repeat_last_n) == (9, ("sum", "zzz"), 3, 32)
    assert params.logit_bias == {17: -100.0}


def test_stop_and_length(openai_client: openai.OpenAI) -> None:
    stopped = openai_client.chat.completions.create(model="small", messages=HELLO, stop=" tokens")
    assert stopped.choices[0].finish_reason == "stop"
    content = stopped.choices[0].message.content
    assert content is not None and content.startswith("You sent") and "tokens" not in content
    cut = openai_client.chat.completions.create(model="small", messages=HELLO, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None and cut.usage.completion_tokens == 2


def test_chat_logprobs(openai_client: openai.OpenAI) -> None:
    reply = openai_client.chat.completions.create(model="small", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == reply.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 and entry.bytes == list(entry.token.encode()) for entry in logprobs.content)
    assert logprobs.content[0].top_logprobs[0].token == logprobs.content[0].token
    stream = openai_client.chat.completions.create(
        model="small", messages=HELLO, logprobs=True, stream=True, stop=[" sent you"]
    )
    found = [entry for chunk in stream for choice in chunk.choices if choice.logprobs for entry in _entries(choice)]
    assert "".join(found) == reply.choices[0].message.content


def _entries(choice: Any) -> list[str]:
    return [entry.token for entry in choice.logprobs.content]


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_a_format_reaches_the_engine(server: RunningServer, engine: FakeEngine, form: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": form} | ({"json_schema": {"name": "x", "schema": schema}} if form == "json_schema" else {})
    assert (
        server.http.post("/v1/chat/completions", json={"messages": HELLO, "response_format": wanted}).status_code == 200
    )
    constraint = engine.requests[-1].constraint
    assert constraint is not None and constraint.kind.value == form
    assert json.loads(constraint.text or "{}") == (schema if form == "json_schema" else {})


@pytest.mark.parametrize(
    ("wanted", "text"),
    [({"type": "regex", "pattern": "a+"}, "a+"), ({"type": "grammar", "grammar": 'start: "a"'}, 'start: "a"')],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_regex_and_a_grammar_reach_the_engine(
    server: RunningServer, engine: FakeEngine, path: str, wanted: dict[str, str], text: str
) -> None:
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": HELLO}
    assert server.http.post(path, json=asked | {"response_format": wanted}).status_code == 200
    constraint = engine.requests[-1].constraint
    assert constraint is not None and (constraint.kind.value, constraint.text) == (wanted["type"], text)


def test_completions_of_every_kind_of_prompt(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    ids = PROMPTS.tokenizer.encode("one two", add_special=True, parse_special=True)
    for prompt in ("one two", ["one two"], ids, [ids]):
        reply = openai_client.completions.create(model="small", prompt=prompt, max_tokens=200)
        assert list(engine.requests[-1].prompt) == ids
        assert reply.choices[0].text == answer_text(ids)
    several = openai_client.completions.create(model="small", prompt=["a", "b b"], n=2, max_tokens=200, echo=True)
    assert [choice.text[:1] for choice in several.choices] == ["a", "a", "b", "b"]
    lengths = {len(request.prompt) for request in engine.requests[-4:]}
    assert several.usage is not None and several.usage.prompt_tokens == sum(lengths)
    openai_client.completions.create(model="small", prompt="x")
    assert engine.requests[-1].params.max_tokens == 16, "as OpenAI has it"


def test_completion_logprobs_and_streams(openai_client: openai.OpenAI) -> None:
    reply = openai_client.completions.create(model="small", prompt="hi", logprobs=1, max_tokens=6)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == reply.choices[0].text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert reply.choices[0].text[offset : offset + len(token)] == token
    stream = openai_client.completions.create(
        model="small", prompt="hi", logprobs=1, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == reply.choices[0].text
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert [offset for part in offsets for offset in part or []] == logprobs.text_offset
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6
    echoed = openai_client.completions.create(model="small", prompt="hi", echo=True, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "hi" + reply.choices[0].text


def test_a_prompt_is_scored(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    """As evaluation harnesses ask for it."""
    text = "héllo 世界 one"
    ids = PROMPTS.tokenizer.encode(text, add_special=True, parse_special=True)
    pieces = [PROMPTS.token_text(each)[0] for each in ids]
    for prompt in (text, ids):
        reply = openai_client.completions.create(model="small", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
        choice, logprobs = reply.choices[0], reply.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
        assert logprobs.tokens[:-1] == pieces and choice.text == text + logprobs.tokens[-1]
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[:-1] == [None, *(-float(i) for i in range(1, len(ids)))]
        assert list(logprobs.top_logprobs or ())[:3] == [None, {pieces[1]: -1.0}, {pieces[2]: -2.0}]
        assert logprobs.text_offset == sorted(logprobs.text_offset) and logprobs.text_offset[-1] == len(text)
        for piece, offset in zip(pieces, logprobs.text_offset, strict=False):
            assert "\ufffd" in piece or choice.text[offset : offset + len(piece)] == piece
        assert engine.requests[-1].scores_prompt and engine.requests[-1].params.ignore_eos


def test_a_prompt_alone_is_scored_or_echoed(openai_client: openai.OpenAI) -> None:
    for logprobs in (0, None):
        whole = openai_client.completions.create(model="small", prompt="hi", echo=True, logprobs=logprobs, max_tokens=0)
        chunks = list(
            openai_client.completions.create(
                model="small", prompt="hi", echo=True, logprobs=logprobs, max_tokens=0, stream=True
            )
        )
        assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == "hi"
        assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
        assert whole.usage is not None and whole.usage.completion_tokens == 0 and whole.usage.prompt_tokens > 0
        parts = [chunk.choices[0].logprobs for chunk in chunks]
        if logprobs is None:
            assert whole.choices[0].logprobs is None and not any(parts)
            continue
        assert whole.choices[0].logprobs is not None
        streamed = [each for part in parts if part is not None for each in part.token_logprobs or ()]
        assert streamed == whole.choices[0].logprobs.token_logprobs and len(streamed) == whole.usage.prompt_tokens


def test_the_last_token_of_a_scored_prompt_is_there_whatever_it_is() -> None:
    """Who scores prompts cuts one token off at the end."""
    with running(FakeEngine(PROMPTS.tokenizer, text=""), PROMPTS) as server:
        body = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 1}
        logprobs = server.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 4


def test_embeddings(openai_client: openai.OpenAI, server: RunningServer) -> None:
    reply = openai_client.embeddings.create(model="small", input=[[5, 6, 7], [5, 6]])  # base64, the client's default
    assert [[round(value, 5) for value in each.embedding] for each in reply.data] == [[0.6, 0.8, 3], [0.6, 0.8, 2]]
    assert reply.usage.prompt_tokens == 5
    floats = server.http.post("/embeddings", json={"input": "a", "encoding_format": "float"}).json()
    assert floats["data"][0]["embedding"][:2] == [0.6, 0.8]


def test_models(openai_client: openai.OpenAI, engine: FakeEngine) -> None:
    assert [model.id for model in openai_client.models.list()] == ["small", "style"]
    assert openai_client.models.retrieve("style").id == "style"
    openai_client.chat.completions.create(model="style", messages=HELLO)
    assert engine.requests[-1].adapters == "style"
    openai_client.chat.completions.create(model="small", messages=HELLO)
    assert engine.requests[-1].adapters is None
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        openai_client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("other")


def test_tokens_there_and_back(server: RunningServer) -> None:
    text = "héllo 世界"
    ids = server.http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    pieces = server.http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    data = b"".join(
        each["piece"].encode() if isinstance(each["piece"], str) else bytes(each["piece"]) for each in pieces
    )
    assert data.decode() == text and [each["id"] for each in pieces] == ids
    special = server.http.post("/tokenize", json={"content": "<|eos|>"}).json()["tokens"]
    plain = server.http.post("/tokenize", json={"content": "<|eos|>", "parse_special": False}).json()["tokens"]
    assert len(special) == 1 < len(plain)


def test_messages_whole(anthropic_client: anthropic.Anthropic, engine: FakeEngine) -> None:
    reply = anthropic_client.messages.create(
        model="small", max_tokens=100, system="Be brief.", messages=[{"role": "user", "content": "hello"}]
    )
    assert reply.content[0].type == "text" and reply.content[0].text == _said(engine)
    assert PROMPTS.tokenizer.decode(engine.requests[-1].prompt) == "<system>Be brief.</><user>hello</><assistant>"
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    num_prompt = len(engine.requests[-1].prompt)
    assert reply.usage.cache_read_input_tokens == num_prompt // 2
    assert reply.usage.input_tokens == num_prompt - num_prompt // 2


def test_messages_end_for_three_reasons(anthropic_client: anthropic.Anthropic) -> None:
    stopped = anthropic_client.messages.create(
        model="small", max_tokens=100, messages=HELLO, stop_sequences=["nothing", " tokens"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " tokens")
    cut = anthropic_client.messages.create(model="small", max_tokens=2, messages=HELLO)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)


def test_messages_streamed(anthropic_client: anthropic.Anthropic, engine: FakeEngine) -> None:
    with anthropic_client.messages.stream(model="small", max_tokens=100, messages=HELLO) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert final.content[0].type == "text" and final.content[0].text == _said(engine)
    assert final.stop_reason == "end_turn" and final.usage.output_tokens > 5


def test_an_answer_that_was_begun_goes_on(anthropic_client: anthropic.Anthropic, engine: FakeEngine) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    anthropic_client.messages.create(model="small", max_tokens=5, messages=begun)
    assert PROMPTS.tokenizer.decode(engine.requests[-1].prompt) == "<user>hello</><assistant>Well,"


def test_tokens_of_messages_are_counted(anthropic_client: anthropic.Anthropic, engine: FakeEngine) -> None:
    counted = anthropic_client.messages.count_tokens(model="small", messages=HELLO)
    anthropic_client.messages.create(model="small", max_tokens=5, messages=HELLO)
    assert counted.input_tokens == len(engine.requests[-1].prompt)


def test_props_health_and_stats(server: RunningServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.head("/health").status_code == 200
    props = server.http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 512 and props["total_slots"] == 4
    stats = server.http.get("/stats").json()
    assert stats["engine"]["ledger"] == {"weights": 900, "slots": 100}
    assert stats["info"]["plan"] == {"plan": {"weight_bytes": 1000}} and stats["rates"]["window_s"] >= 0


def test_metrics_count_what_was_asked(engine: FakeEngine) -> None:
    with running(FakeEngine(PROMPTS.tokenizer), PROMPTS) as server:
        server.http.post("/v1/chat/completions", json={"messages": HELLO})
        server.http.post("/v1/chat/completions", json={"messages": HELLO, "nonsense": 1})
        server.http.get("/nowhere/at/all")
        text = server.http.get("/metrics").text
    assert 'pipo_requests_total{route="/chat/completions",status="200"} 1.0' in text
    assert 'pipo_requests_total{route="/chat/completions",status="400"} 1.0' in text
    assert 'pipo_requests_total{route="other",status="404"} 1.0' in text, "a path of a stranger is no label"
    assert 'pipo_ledger_bytes{name="weights"} 900.0' in text and 'pipo_stall_seconds_total{cause="drive"} 1.5' in text
    for name, value in (
        ("bytes_read_total", "4096.0"), ("limit_bytes", "1e+09"), ("queue_length", "0.0"), ("running", "0.0"),
        ("ready", "1.0"), ("prompt_tokens_total", "0.0"), ("cached_tokens_total", "0.0"), ("passes_total", "0.0"),
        ("compute_seconds_total", "0.0"), ("pass_seconds_total", "0.0"), ("anonymous_bytes", "0.0"),
        ("peak_bytes", "0.0"),
    ):  # fmt: skip
        assert f"\npipo_{name} {value}\n" in text
    for name in ("ttft", "tpot", "queue"):
        assert f"pipo_{name}_seconds_count 1.0" in text


def test_the_page_or_words_in_its_place(server: RunningServer) -> None:
    reply = server.http.get("/")
    assert reply.status_code == 200
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert server.http.get("/static/../../../etc/passwd").status_code == 404
    assert server.http.get("/static/%2e%2e/app.py").status_code == 404
    assert server.http.get("/static//etc/passwd").status_code == 404
