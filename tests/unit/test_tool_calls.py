"""Recorded answers of each family, in pieces of every size: the same parts come out, and never half a marker."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipo.text.answer_formats import AnswerFormat, Tool, answer_format_of, read_tools
from pipo.text.tool_calls import ToolCall, answer_reader

TOOLS = read_tools(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                    "required": ["city"],
                },
            },
        },
        {"type": "function", "function": {"name": "now"}},
    ]
)
PARIS = ("get_weather", {"city": "Paris"})
# what the families' own templates have in them
TEMPLATES = {
    "hermes": "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call> <think>",
    "llama 3": "<|python_tag|> <|eot_id|> \"parameters\"",
    "mistral": "[TOOL_CALLS] [AVAILABLE_TOOLS]",
    "mistral by name": "[TOOL_CALLS] [ARGS] [THINK]",
    "gemma 4": "<|tool_call>call: <tool_call|> <|channel>thought",
    "functiongemma": "<start_function_call>call:",
    "harmony": "<|start|>assistant<|channel|>final<|message|>",
    "phi 4": "<|tool|>{{ tools }}<|/tool|>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜> </think>",
    "qwen coder": "<tool_call>\n<function=example>\n<parameter=a>",
    "plain": "{% for message in messages %}",
}  # fmt: skip


@dataclass
class Read:
    """All of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    made: list[ToolCall] = field(default_factory=list)


def read(
    family: str, answer: str, size: int = 10_000, tools: tuple[Tool, ...] = TOOLS, prompt: str = "", hides: bool = True
) -> Read:
    """In pieces of `size` characters."""
    format = answer_format_of(TEMPLATES[family])
    reader, found = answer_reader(format, tools, prompt=prompt), Read()
    deltas = [reader.feed(answer[start : start + size]) for start in range(0, len(answer), size)]
    for delta in [*deltas, reader.finish()]:
        found.text += delta.text
        found.reasoning += delta.reasoning
        found.made += delta.calls
        if hides:
            shown = found.text + "\0" + found.reasoning
            assert not any(shown.endswith(m[:n]) for m in _long_markers(format) for n in range(4, len(m) + 1)), shown
    found.calls = [(call.name, json.loads(call.arguments)) for call in found.made]
    return found


def _long_markers(format: AnswerFormat) -> list[str]:
    return [marker for marker in format.markers if len(marker) > 4]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_family_is_known_by_its_template(family: str) -> None:
    assert answer_format_of(TEMPLATES[family]).tools.name == family


def test_models_without_a_template_write_plain_json() -> None:
    assert answer_format_of(None).tools.name == "plain" and answer_format_of(None).thinking is None


ANSWERS = {
    "hermes": [
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", "", [PARIS]),
        (
            'I look.\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n'
            '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}\n</tool_call>',
            "I look.",
            "",
            [("now", {}), PARIS],
        ),
        (
            '<think>\nWhich city? Paris.\n</think>\n\n<tool_call>{"name": "now"}</tool_call>',
            "",
            "Which city? Paris.",
            [("now", {})],
        ),
        ("<think>\n\n</think>\n\nHello <b>you</b> <tool", "Hello <b>you</b> <tool", "", []),
        ("The tag </think> is text.", "The tag </think> is text.", "", []),
    ],
    "llama 3": [
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", "", [PARIS]),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", "", [PARIS]),
        (
            '{"type": "function", "name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
            "",
            "",
            [("now", {})] * 2,
        ),
        ('{"temperature": 21}', '{"temperature": 21}', "", []),
        ('{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', "", []),
        ("It is 21 degrees.", "It is 21 degrees.", "", []),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcDEF123"}]', "", "", [PARIS]),
        (
            '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Paris"}}]',
            "",
            "",
            [("now", {}), PARIS],
        ),
    ],
    "mistral by name": [
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', "", "", [PARIS, ("now", {})]),
        ('[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{"city": "Paris"}', "", "", [PARIS]),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}', "", "", [PARIS]),
        ("[THINK]Let me see.[/THINK]It is [so].", "It is [so].", "Let me see.", []),
    ],
    "gemma 4": [
        ('<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>', "", "", [PARIS]),
        (
            '<|tool_call>call:f{a:-1.5e3,b:true,c:null,d:[1,{x:<|"|>}, "y":<|"|>}],e:{}}<tool_call|>',
            "",
            "",
            [("f", {"a": -1500.0, "b": True, "c": None, "d": [1, {"x": '}, "y":'}], "e": {}})],
        ),
        ("<|channel>thought\nHm.<channel|>Yes.", "Yes.", "Hm.", []),
    ],
    "functiongemma": [
        (
            "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>",
            "",
            "",
            [("get_weather", {"city": "Paris", "days": 2})],
        ),
    ],
    "harmony": [
        (
            "<|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            "",
            "I need the weather.",
            [PARIS],
        ),
        (
            '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city":"Paris"}',
            "",
            "",
            [PARIS],
        ),
        (
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
            "It is 4.",
            "Easy.",
            [],
        ),
        (
            "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>final<|message|>Done",
            "I will look.Done",
            "",
            [],
        ),
        ("Just text.", "Just text.", "", []),
        ("to=be or not", "to=be or not", "", []),
        ("<|channel|>commentary to=functions.now<|message|>{}", "", "", [("now", {})]),
    ],
    "phi 4": [
        ('<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>', "", "", [PARIS]),
        (
            '<|tool_call|>[{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]',
            "",
            "",
            [PARIS],
        ),
    ],
    "deepseek": [
        (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n'
            "```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>",
            "",
            "",
            [PARIS, ("now", {})],
        ),
        (
            'ok <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "ok",
            "",
            [PARIS],
        ),
    ],
    "qwen coder": [
        (
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            "",
            "",
            [("get_weather", {"city": "Paris", "days": 3})],
        ),
        (
            "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n</function>\n</tool_call>",
            "",
            "",
            [("get_weather", {"city": "12"})],
        ),
        ("<tool_call>\n<function=now>\n</function>\n</tool_call>", "", "", [("now", {})]),
    ],
    "plain": [
        ('{"name": "get_weather", "arguments": {"city": "Paris"}}', "", "", [PARIS]),
        ('[{"name": "now", "arguments": {}}]', "", "", [("now", {})]),
        (' {"answer": [1, 2]}', ' {"answer": [1, 2]}', "", []),
    ],
}
CASES = [
    pytest.param(family, *case, id=f"{family} {i}") for family, cases in ANSWERS.items() for i, case in enumerate(cases)
]


@pytest.mark.parametrize(("family", "answer", "text", "reasoning", "calls"), CASES)
def test_recorded_answers(family: str, answer: str, text: str, reasoning: str, calls: list[tuple[str, Any]]) -> None:
    for size in (1, 2, 3, 5, 8, 13, 10_000):
        found = read(family, answer, size, hides=size < 10_000 and "<tool" not in text)
        assert (found.text, found.reasoning, found.calls) == (text, reasoning, calls), size


BROKEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call> so',
    "llama 3": '{"name": "get_weather", "parameters": {"city": ',
    "mistral": '[TOOL_CALLS][{"name": "get_weather"',
    "gemma 4": "<|tool_call>call:get_weather{city:Paris}<tool_call|>",
    "functiongemma": "<start_function_call>get_weather<end_function_call> x",
    "phi 4": "<|tool_call|>[{}]<|/tool_call|>",
    "deepseek": "<｜tool▁calls▁begin｜>what<｜tool▁calls▁end｜>",
    "qwen coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</function>\n</tool_call>",
    "mistral by name": "[TOOL_CALLS]get_weather[ARGS]{oops",
    "plain": '{"name": "get_weather", "arguments": 5}',
}


@pytest.mark.parametrize("family", BROKEN)
def test_what_is_broken_stays_text_and_nothing_is_lost(family: str) -> None:
    for size in (1, 4, 10_000):
        found = read(family, BROKEN[family], size, hides=False)
        assert (found.text, found.calls) == (BROKEN[family], [])


def test_a_broken_call_in_harmony_is_shown_without_its_header() -> None:
    found = read("harmony", "<|channel|>commentary to=functions.now<|message|>{oops<|call|>")
    assert (found.text, found.calls) == ("{oops", [])


@pytest.mark.parametrize("family", [family for family in TEMPLATES if family != "harmony"])
def test_without_tools_nothing_is_a_call_and_text_is_left_alone(family: str) -> None:
    answer = ANSWERS[family][0][0] + " \n"
    assert read(family, answer, 3, tools=(), hides=False).text == answer


def test_a_prompt_that_begins_the_thinking() -> None:
    answer, prompt = "Paris, I think.\n</think>\n\nParis.", "<|im_start|>assistant\n<think>\n"
    for size in (1, 7, 100):
        found = read("hermes", answer, size, prompt=prompt)
        assert (found.text, found.reasoning) == ("Paris.", "Paris, I think.")
    assert read("hermes", "Paris, I", 2, prompt=prompt).reasoning == "Paris, I"
    assert read("hermes", "Paris.", prompt=prompt + "\n</think>\n\n").text == "Paris."


def test_white_space_of_an_answer_without_calls_is_kept() -> None:
    for size in (1, 100):
        assert read("hermes", " a \n b \n", size).text == " a \n b \n"
        assert read("plain", "\n{x} ", size).text == "\n{x} "


def test_ids_are_the_models_or_new_ones() -> None:
    (call,) = read("mistral", ANSWERS["mistral"][0][0]).made
    assert call.id == "abcDEF123"
    first, second = read("mistral", ANSWERS["mistral"][1][0]).made
    assert first.id != second.id and all(len(call.id) == 9 and call.id.isalnum() for call in (first, second))
    (call,) = read("hermes", ANSWERS["hermes"][0][0]).made
    assert call.id.startswith("call_")


def test_calls_come_as_soon_as_they_are_whole() -> None:
    reader = answer_reader(answer_format_of(TEMPLATES["hermes"]), TOOLS)
    assert not reader.feed('<tool_call>{"name": "now"}</tool_cal').calls
    assert [call.name for call in reader.feed("l>").calls] == ["now"]
    assert reader.finish().text == ""


def test_long_hostile_answers_take_linear_time() -> None:
    """Some seconds each where it were quadratic."""
    for family, answer in {
        "qwen coder": "<tool_call>" + "<function=a>" * 40_000 + "</tool_call>",
        "hermes": "<tool_call>" * 40_000,
        "gemma 4": "<|tool_call>" + "call:f{a:[" * 30_000 + "<tool_call|>",
        "mistral": "[TOOL_CALLS]" + "[" * 300_000,
        "deepseek": "<｜tool▁calls▁begin｜>" + "<｜tool▁call▁begin｜>x" * 20_000 + "<｜tool▁calls▁end｜>",
    }.items():
        assert read(family, answer, 10_000, hides=False).text == answer
