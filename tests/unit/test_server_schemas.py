"""What clients write, as templates and the engine read it; and rates made of counters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipo.generation.request import ConstraintKind
from pipo.server.answer_reader import AnswerDelta, ToolCall
from pipo.server.body import parse
from pipo.server.errors import ApiError
from pipo.server.metrics import Metrics
from pipo.server.routes.messages import _Blocks
from pipo.server.schemas.chat import ChatBody
from pipo.server.schemas.messages import CountBody, MessagesBody
from pipo.server.settings import Limits
from pipo.serving.contract import EngineStats

WEATHER = {"name": "weather", "description": "of a place", "parameters": {"type": "object"}}


def _chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [{"role": "user", "content": "hi"}]} | fields).encode())


def _messages(messages: list[dict[str, Any]], **fields: Any) -> CountBody:
    return parse(CountBody, json.dumps({"model": "m", "messages": messages} | fields).encode())


def test_messages_of_openai_become_the_templates() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
    body = _chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "weather?", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]
    )
    system, user, assistant, tool = body.template_messages()
    assert system == {"role": "system", "content": "be brief"}
    assert user == {"role": "user", "content": "weather?", "name": "ann"}
    assert assistant["content"] == "" and assistant["reasoning_content"] == "hm"
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    assert assistant["tool_calls"] == [{"id": "c1", "type": "function", "function": function}]
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


@pytest.mark.parametrize("arguments", ["{", "[]", "5", "null"])
def test_arguments_of_a_call_that_are_no_object(arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(ApiError, match="no JSON object"):
        _chat(messages=[{"role": "assistant", "tool_calls": [call]}]).template_messages()


def test_tool_choices_of_openai() -> None:
    tools = [{"type": "function", "function": WEATHER}]
    assert _chat(tools=tools).choice.mode == "auto" and _chat(tools=tools).choice.is_parallel
    assert list(_chat(tools=tools).choice.tools) == tools
    assert _chat(tools=tools, tool_choice="required").choice.mode == "required"
    named = {"type": "function", "function": {"name": "weather"}}
    assert _chat(tools=tools, tool_choice=named).choice.mode == "weather"
    assert not _chat(tools=tools, parallel_tool_calls=False).choice.is_parallel
    with pytest.raises(ApiError, match="there is no tool 'other'"):
        _ = _chat(tools=tools, tool_choice={"type": "function", "function": {"name": "other"}}).choice


def test_formats_become_constraints() -> None:
    assert _chat().constraint is None and _chat(response_format={"type": "text"}).constraint is None
    found = _chat(response_format={"type": "json_object"}).constraint
    assert found is not None and found.kind is ConstraintKind.JSON_OBJECT
    schema = {"type": "object", "required": ["é"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    found = _chat(response_format=wanted).constraint
    assert found is not None and found.kind is ConstraintKind.JSON_SCHEMA and json.loads(found.text) == schema


def test_what_is_left_out_is_as_run_has_it() -> None:
    params = _chat(temperature=None, stop=None).params(9, None)
    assert (params.temperature, params.top_k, params.stop, params.seed, params.max_tokens) == (0.8, 40, (), None, 9)


def test_messages_of_anthropic_become_the_templates() -> None:
    body = _messages(
        [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"place": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no such place", "is_error": True},
                ],
            },
        ],
        system=[{"type": "text", "text": "be brief"}],
    )
    system, first, assistant, *rest = body.template_messages()
    assert system == {"role": "system", "content": "be brief"} and first == {"role": "user", "content": "weather?"}
    assert assistant["content"] == "I look." and assistant["reasoning_content"] == "hm"
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    assert assistant["tool_calls"] == [{"id": "t1", "type": "function", "function": function}]
    assert rest == [
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "error: no such place"},
        {"role": "user", "content": "and?"},
    ]


def test_tools_of_anthropic_become_openais() -> None:
    tool = {"name": "weather", "description": "of a place", "input_schema": {"type": "object"}}
    hello = [{"role": "user", "content": "hi"}]
    choice = _messages(hello, tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True}).choice
    assert list(choice.tools) == [{"type": "function", "function": WEATHER}]
    assert (choice.mode, choice.is_parallel) == ("required", False)
    assert _messages(hello, tools=[tool], tool_choice={"type": "tool", "name": "weather"}).choice.mode == "weather"
    assert _messages(hello, tools=[tool]).choice.mode == "auto"


def test_sampling_of_anthropic() -> None:
    data = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "stop_sequences": ["a"]}
    params = parse(MessagesBody, json.dumps(data | {"temperature": 0.5, "top_k": 3}).encode()).params(5)
    assert (params.temperature, params.top_k, params.top_p, params.stop) == (0.5, 3, 0.95, ("a",))


def test_blocks_of_an_answer() -> None:
    blocks = _Blocks()
    deltas = [
        AnswerDelta(reasoning="h"),
        AnswerDelta(reasoning="m", text="I "),
        AnswerDelta("look.", calls=[ToolCall("c1", "f", '{"a": 1}'), ToolCall("c2", "g", "{}")]),
    ]
    changes = [change for delta in deltas for change in blocks.take(delta)]
    assert [change.block is not None for change in changes] == [True, False, True, False, True, True]
    assert changes[0].block == {"type": "thinking", "thinking": "", "signature": ""}
    assert changes[3].delta == {"type": "text_delta", "text": "look."}
    assert changes[4].block == {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
    assert changes[4].delta == {"type": "input_json_delta", "partial_json": '{"a": 1}'}
    thought, text, call, other = blocks.whole()
    assert (thought["thinking"], text["text"], call["input"], other["input"]) == ("hm", "I look.", {"a": 1}, {})
    assert blocks.has_calls


def test_rates_are_of_the_last_seconds() -> None:
    metrics = Metrics()

    def at(now_s: float, tokens: int) -> dict[str, float]:
        return metrics.rates(EngineStats(completion_tokens=tokens, wall_s=now_s, stall_s={"drive": now_s / 4}), now_s)

    assert at(0.0, 0)["completion_tokens_per_s"] == 0
    found = at(2.0, 10)
    assert (found["completion_tokens_per_s"], found["window_s"], found["stall_share"]) == (5.0, 2.0, 0.25)
    for second in range(3, 31):
        found = at(float(second), 10)
    assert found["completion_tokens_per_s"] == 0, "what was before is forgotten"
    assert 10.0 <= found["window_s"] <= 11.0


def test_what_a_server_takes_of_the_budget_grows_with_the_context() -> None:
    limits = Limits()
    assert limits.max_logprob_bytes < limits.kept_bytes(8192) < limits.kept_bytes(131072)
    assert Limits(max_body_bytes=5).body_bytes(10**6) == 5
