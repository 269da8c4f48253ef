"""Calls of tools and thoughts on both APIs, over an engine that says what a model would."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from pipo.generation.request import ConstraintKind
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, running, small_prompts

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}{# <think></think> #}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}<assistant>"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
SAID = f"<think>\nhm\n</think>\n\nI look.\n{CALL}\n{CALL}"
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PROMPTS = small_prompts(TEMPLATE)


def _engine() -> FakeEngine:
    return FakeEngine(PROMPTS.tokenizer, context_tokens=4096, text=SAID)


def _openai(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_calls_of_openai() -> None:
    engine = _engine()
    with running(engine, PROMPTS) as server:
        reply = _openai(server).chat.completions.create(model="small", messages=HELLO, tools=TOOLS)
        message = reply.choices[0].message
        assert message.content == "I look." and reply.choices[0].finish_reason == "tool_calls"
        assert message.model_extra is not None and message.model_extra["reasoning_content"] == "hm"
        assert message.tool_calls is not None
        calls: list[Any] = list(message.tool_calls)
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("weather", {"place": "Oslo"})
        ] * 2
        assert len({call.id for call in calls}) == 2
        assert '"weather"' in PROMPTS.tokenizer.decode(engine.requests[-1].prompt)
        results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
        again = [*HELLO, message.model_dump(exclude_none=True), *results]
        _openai(server).chat.completions.create(model="small", messages=again, tools=TOOLS)
        assert "<tool>rain<tool>rain" in PROMPTS.tokenizer.decode(engine.requests[-1].prompt)


def test_calls_of_openai_in_a_stream() -> None:
    with running(_engine(), PROMPTS) as server:
        stream = _openai(server).chat.completions.create(model="small", messages=HELLO, tools=TOOLS, stream=True)
        deltas: list[Any] = []
        for chunk in stream:
            deltas.append(chunk.choices[0].delta)
            finish = chunk.choices[0].finish_reason
        assert "".join(delta.content or "" for delta in deltas) == "I look." and finish == "tool_calls"
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1] and calls[0].function.name == "weather"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_a_grammar(choice: Any) -> None:
    engine = _engine()
    with running(engine, PROMPTS) as server:
        server.http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, "tool_choice": choice})
        constraint = engine.requests[-1].constraint
        assert constraint is not None and constraint.kind is ConstraintKind.GRAMMAR and "weather" in constraint.text
        both = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice, "response_format": {"type": "json_object"}}
        reply = server.http.post("/v1/chat/completions", json=both)
        assert reply.status_code == 400 and "contradict" in reply.json()["error"]["message"]


def test_no_tools_are_shown_where_none_may_be_called() -> None:
    engine = _engine()
    with running(engine, PROMPTS) as server:
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}
        reply = server.http.post("/v1/chat/completions", json=body).json()
        assert "weather" not in PROMPTS.tokenizer.decode(engine.requests[-1].prompt)
        assert (
            reply["choices"][0]["finish_reason"] == "stop"
            and "<tool_call>" in reply["choices"][0]["message"]["content"]
        )


def test_calls_of_anthropic() -> None:
    engine = _engine()
    tool: Any = {"name": "weather", "input_schema": PARAMETERS}
    with running(engine, PROMPTS) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        whole = client.messages.create(model="small", max_tokens=999, messages=HELLO, tools=[tool])
        with client.messages.stream(model="small", max_tokens=999, messages=HELLO, tools=[tool]) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            blocks: list[Any] = list(message.content)
            assert [block.type for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
            assert (blocks[0].thinking, blocks[1].text, blocks[2].input) == ("hm", "I look.", {"place": "Oslo"})
            assert message.stop_reason == "tool_use"
        results: Any = [
            {"type": "tool_result", "tool_use_id": each.id, "content": "rain"} for each in whole.content[2:]
        ]
        again: Any = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
        client.messages.create(model="small", max_tokens=9, messages=again, tools=[tool])
        assert "<tool>rain<tool>rain" in PROMPTS.tokenizer.decode(engine.requests[-1].prompt)
