"""Messages as OpenAI's API has them, as templates get them."""

from __future__ import annotations

from typing import Any

import pytest

from pipo.base.errors import UsageError
from pipo.text.chat_template import ChatTemplate
from pipo.text.conversation import template_messages

ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "new?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I look.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]
# as Qwen's and Hermes' templates read them
HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'tool' %}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{\"name\": \"{{ call.function.name }}\", "
    "\"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)  # fmt: skip


def test_texts_arguments_and_names() -> None:
    user, assistant, tool = template_messages(ASKED)
    assert user == {"role": "user", "content": "What is new?"}
    assert assistant["content"] == "" and assistant["reasoning_content"] == "I look."
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "look", "arguments": {"at": "é"}},
        {"name": "now", "arguments": {}},
    ]
    assert tool == {"role": "tool", "tool_call_id": "call_2", "content": "noon", "name": "now"}
    assert ASKED[1]["content"] is None  # what was given is as it was


def test_ids_that_templates_refuse_are_renamed_alike() -> None:
    _, assistant, tool = template_messages(ASKED, id_chars=9)
    ids = [call["id"] for call in assistant["tool_calls"]]
    assert len(set(ids)) == 2 and all(len(each) == 9 and each.isalnum() for each in ids)
    assert tool["tool_call_id"] == ids[1] and tool["name"] == "now"
    own = [{"role": "tool", "tool_call_id": "abcDEF123", "content": ""}]
    assert template_messages(own, id_chars=9)[0]["tool_call_id"] == "abcDEF123"


def test_a_template_reads_tools_calls_and_results() -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "<look> & see"}}]
    rendered = ChatTemplate(HERMES, None, None).render(template_messages(ASKED), tools=tools)
    assert rendered == (
        '{"type": "function", "function": {"name": "look", "description": "<look> & see"}}\n'
        "<|im_start|>user\nWhat is new?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hi", r"messages\[0\] must be an object with a role"),
        ({"content": "hi"}, "with a role"),
        ({"role": "user", "content": 5}, r"messages\[0\].content must be a string or a list"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\] is of type 'image_url', only text"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\] is no call of a function"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments is no JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, "must be an object"),
    ],
)
def test_what_is_no_conversation(message: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        template_messages([message])
