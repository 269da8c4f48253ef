from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pipo.base.errors import MalformedFile, UsageError
from pipo.text import chat_template
from pipo.text.chat_template import ChatTemplate

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_STYLE = """{{- bos_token }}
{%- if tools is not none %}
    {{- '<|start_header_id|>tools<|end_header_id|>\\n\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim %}
    {{- content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL_STYLE = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate, got ' + message['role']) }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}
"""
ZEPHYR_STYLE = """{% for message in messages %}
{% if message['role'] == 'skip' %}
    {% continue %}
{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] + eos_token }}
{% set ns = namespace(last=message) %}
{% if loop.last and add_generation_prompt %}
<|assistant|>
{% endif %}
{% endfor %}
"""
TOOLS_STYLE = """{%- for tool in tools or [] %}{{ tool | tojson }}{{ tool | tojson(sort_keys=true) }}{%- endfor %}
{%- for message in messages -%}
    {{ message.content | default('nothing', true) | string | upper }}
    {%- if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}
    {%- for word in message.get('content', '').split() if loop.index < 3 %}{{ word[::-1] }}{% break %}{%- endfor %}
{%- endfor %}{{ documents is none }}{{ undefined_name is defined }}{{ [1, 2] | map('string') | join(',') }}"""

TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama3": LLAMA3_STYLE,
    "mistral": MISTRAL_STYLE,
    "zephyr": ZEPHYR_STYLE,
    "tools": TOOLS_STYLE,
}
CHATS: dict[str, list[dict[str, object]]] = {
    "one": [{"role": "user", "content": "Hello <b>\"you\" & 'me'</b> 你好 👍 \n"}],
    "turns": [
        {"role": "user", "content": " first\n\n"},
        {"role": "assistant", "content": "{{ 'not a template' }}"},
        {"role": "user", "content": "<|im_end|>"},
    ],
    "empty": [{"role": "user", "content": ""}],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "parameters": {"b": 1, "a": [None]}}}


def theirs(source: str, messages: list[Any], *, prompt: bool, tools: list[Any] | None) -> str:
    rendered: Any = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return str(rendered[0][0])


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, "<s>", "</s>").render([], variables=variables)


class TestParityWithTransformers:
    @pytest.mark.parametrize("prompt", [False, True])
    @pytest.mark.parametrize("chat", CHATS)
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_same_text(self, name: str, chat: str, prompt: bool) -> None:
        source, messages = TEMPLATES[name], CHATS[chat]
        for tools in (None, [TOOL]):
            ours = ChatTemplate(source, "<s>", "</s>").render(messages, prompt, tools=tools)
            assert ours == theirs(source, messages, prompt=prompt, tools=tools)

    def test_tool_calls(self) -> None:
        messages = [{"role": "assistant", "content": None, "tool_calls": [TOOL]}]
        source = "{% for m in messages %}{{ m.content is none }}{{ m.tool_calls | tojson }}{% endfor %}"
        assert ChatTemplate(source, None, None).render(messages) == theirs(source, messages, prompt=True, tools=None)

    def test_generation_prompt_is_on_by_default(self) -> None:
        assert ChatTemplate(SMOLLM2, None, None).render(CHATS["one"]).endswith("<|im_start|>assistant\n")

    def test_generation_opens_a_scope(self) -> None:
        source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
        assert render(source) == theirs(source, [], prompt=True, tools=None) == "21"

    def test_strftime_now(self) -> None:
        assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)

    def test_json_is_not_escaped_for_html(self) -> None:
        assert json.loads(render("{{ x | tojson }}", x={"k": "<é>'"})) == {"k": "<é>'"}
        assert render("{{ x | tojson }}", x="<é>'") == '"<é>\'"'


class TestVariables:
    def test_special_tokens(self) -> None:
        assert render("{{ bos_token + eos_token }}") == "<s></s>"
        assert ChatTemplate("[{{ bos_token + eos_token }}]", None, None).render([]) == "[]"

    def test_own_ones_do_not_replace_ours(self) -> None:
        assert render("{{ enable_thinking }}{{ messages }}", enable_thinking=False, messages="x") == "False[]"


class TestFromMetadata:
    def test_takes_the_key(self) -> None:
        template = ChatTemplate.from_metadata({chat_template.TEMPLATE_KEY: "{{ bos_token }}!"}, "<s>", "</s>")
        assert template.render([]) == "<s>!"

    def test_missing(self) -> None:
        with pytest.raises(UsageError, match="no chat template") as caught:
            ChatTemplate.from_metadata({}, None, None)
        assert "--raw" in str(caught.value)

    def test_not_a_string(self) -> None:
        with pytest.raises(MalformedFile, match=r"tokenizer\.chat_template' is 7"):
            ChatTemplate.from_metadata({chat_template.TEMPLATE_KEY: 7}, None, None)


class TestErrors:
    def test_words_of_the_template(self) -> None:
        with pytest.raises(UsageError, match="Roles must alternate, got assistant"):
            ChatTemplate(MISTRAL_STYLE, "<s>", "</s>").render([{"role": "assistant", "content": "x"}])

    @pytest.mark.parametrize(
        "source",
        ["{% if %}", "{{ x", "{% generation %}x", "{% unknown_tag %}", "{{ x | no_such_filter }}", "{% break %}"],
    )
    def test_not_a_template(self, source: str) -> None:
        with pytest.raises(MalformedFile, match="chat template"):
            render(source)

    def test_line_is_named(self) -> None:
        with pytest.raises(MalformedFile, match="line 3"):
            render("a\nb\n{% if %}")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ messages[0].role.x }}", "UndefinedError"),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ 'a' + 1 }}", "TypeError"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
            ("{{ messages | tojson(indent='x' * 3, separators=1) }}", "TypeError"),
        ],
    )
    def test_failures_are_typed(self, source: str, message: str) -> None:
        with pytest.raises(MalformedFile, match=message):
            render(source)

    def test_nested_too_deep(self) -> None:
        with pytest.raises(MalformedFile, match="chat template"):
            render("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


class TestSandbox:
    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.__init__.__globals__ }}",
            "{{ raise_exception.__globals__ }}",
            "{{ strftime_now.__globals__['json'] }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ '{0.__class__}'.format(1) }}",
        ],
    )
    def test_internals_are_out_of_reach(self, source: str) -> None:
        try:
            text = render(source)
        except MalformedFile as error:
            assert "unsafe" in str(error) or "Undefined" in str(error) or "Security" in str(error)
        else:
            assert text == ""

    def test_messages_cannot_be_changed(self) -> None:
        messages: list[Mapping[str, object]] = [{"role": "user", "content": "x"}]
        with pytest.raises(MalformedFile, match="SecurityError"):
            ChatTemplate("{{ messages.append(1) }}", None, None).render(messages)
        assert len(messages) == 1

    @pytest.mark.parametrize(
        "source",
        [
            "{% for a in range(10**9) %}{% endfor %}",
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "{{ 'x' * 10**9 }}",
            "{{ 10**9 * [1] }}",
            "{{ 7 ** 100000000 }}",
            "{{ 9 ** 999 ** 999 ** 999 }}",
            "{% for a in range(100) %}{% for b in range(100) %}{{ x }}{% endfor %}{% endfor %}",
        ],
    )
    def test_bounds(self, source: str) -> None:
        with pytest.raises(MalformedFile, match=r"chat template wants|chat template failed"):
            render(source, x="x" * 2000)

    def test_the_bounds_are_per_rendering(self) -> None:
        template = ChatTemplate("{% for a in range(600000) %}{% endfor %}", None, None)
        assert [template.render([]), template.render([])] == ["", ""]
