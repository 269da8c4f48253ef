"""From a row to what is asked: templates over columns, columns that are prompts, OpenAI's bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipo.base.errors import UsageError
from pipo.generation.request import ConstraintKind, SamplingParams
from pipo.jobs.answers import Answer
from pipo.jobs.openai_lines import constraint_of, params_of, response_line
from pipo.jobs.prompts import PromptSettings, PromptSource
from pipo.jobs.table import Contents
from pipo.text.prompt_template import PromptTemplate

PARAMS = SamplingParams(temperature=0, max_tokens=5)


def _source(columns: tuple[str, ...], *, is_openai: bool = False, **settings: Any) -> PromptSource:
    return PromptSource(PromptSettings(PARAMS, **settings), Contents(columns, 1, {}, is_openai))


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_template_over_columns() -> None:
    template = PromptTemplate("{% for x in list %}{{ x }}-{% endfor %}{{ name|upper }} {{ other|default('none') }}")
    assert template.columns == {"list", "name", "other"} and template.needed == {"list", "name"}
    assert template.render({"list": [1, 2], "name": "ab"}) == "1-2-AB none"
    assert PromptTemplate("{% if name %}{% set kind = 'b' %}{% endif %}{{ kind|default('a') ~ kind }}").needed == {
        "name"
    }
    with pytest.raises(UsageError, match=r"'name' is undefined"):
        template.render({"list": []})


@pytest.mark.parametrize("source", ["{{ a", "{% if %}", "{% endfor %}"])
def test_template_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="line 1"):
        PromptTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ a.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ a * 10000000 }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{{ 9 ** 9999999 }}",
        "{{ a.missing.more }}",
        "{{ a + 1 }}",
    ],
)
def test_template_is_kept_in_its_sandbox_and_fails_its_row_alone(source: str) -> None:
    with pytest.raises(UsageError, match="prompt template"):
        PromptTemplate(source).render({"a": "text"})


def test_template_of_a_column_that_no_row_has_is_refused_before_the_start() -> None:
    with pytest.raises(UsageError, match=r"reads 'titel', the table has 'title', 'body'"):
        _source(("title", "body"), template="{{ titel }} {{ body }}")


@pytest.mark.parametrize(
    ("columns", "row", "asked"),
    [
        (("id", "prompt"), {"id": 1, "prompt": "Hi"}, _user("Hi")),
        (("only",), {"only": "Hi"}, _user("Hi")),
        (("file", "text"), {"file": "a", "text": "Hi"}, _user("Hi")),
        (("messages", "x"), {"messages": _user("Hi"), "x": 1}, _user("Hi")),
        (("prompt",), {"prompt": [{"role": "user", "content": [{"type": "text", "text": "H"}]}]}, _user("H")),
    ],
)
def test_column_that_is_the_prompt(columns: tuple[str, ...], row: dict[str, Any], asked: object) -> None:
    assert _source(columns).ask(row).prompt == asked


def test_system_and_raw() -> None:
    row = {"prompt": "Hi"}
    assert _source(("prompt",), system="Be brief.").ask(row).prompt == [
        {"role": "system", "content": "Be brief."},
        *_user("Hi"),
    ]
    assert _source(("prompt",), is_raw=True).ask(row).prompt == "Hi"
    with pytest.raises(UsageError, match="system message of its own"):
        _source(("prompt",), system="x").ask({"prompt": [{"role": "system", "content": "y"}, *_user("Hi")]})


def test_unclear_or_missing_column_lists_those_there_are() -> None:
    for settings in ({}, {"column": "c"}):
        with pytest.raises(UsageError, match="'a', 'b'"):
            _source(("a", "b"), **settings)


@pytest.mark.parametrize(
    "row",
    [{}, {"prompt": None}, {"prompt": 3}, {"prompt": []}, {"prompt": [{"role": 1}]}, {"prompt": [{"role": "user"}]}],
)
def test_bad_values_fail_their_row(row: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        _source(("prompt", "x")).ask(row)


def _line(**changes: Any) -> dict[str, Any]:
    body = {"model": "any", "messages": _user("Hi")}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


def test_openai_line_brings_its_own_parameters() -> None:
    body = {
        "messages": _user("Hi"),
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "stop": "x",
        "logit_bias": {"7": 2},
    }
    asked = _source((), is_openai=True).ask(_line(body={**body, "seed": None, "user": "me", "n": 1}))
    assert asked.prompt == _user("Hi")
    assert asked.params == SamplingParams(max_tokens=9, temperature=0.5, stop=["x"], logit_bias={7: 2.0})
    plain = _line(url="/v1/completions", body={"prompt": "Once"})
    assert _source((), is_openai=True).ask(plain).prompt == "Once"


@pytest.mark.parametrize(
    "line",
    [
        _line(url="/v1/embeddings"),
        _line(method="GET"),
        _line(custom_id=3),
        _line(body=[]),
        _line(body={"prompt": "x"}),
        _line(body={"messages": "x"}),
        _line(url="/v1/completions", body={"prompt": ["a", "b"]}),
    ],
)
def test_openai_line_that_cannot_be_asked_fails_alone(line: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        _source((), is_openai=True).ask(line)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"stream": True},
        {"tools": [{}]},
        {"temperature": "hot"},
        {"top_p": 2},
        {"logit_bias": [1]},
        {"typo": 1},
    ],
)
def test_no_parameter_is_ignored(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(more))):
        params_of(more, PARAMS)


def test_openai_lines_take_no_flags_for_prompts() -> None:
    for settings in ({"template": "x"}, {"column": "x"}, {"system": "x"}, {"is_raw": True}):
        with pytest.raises(UsageError, match="no meaning for OpenAI"):
            _source((), is_openai=True, **settings)


def test_response_format() -> None:
    assert constraint_of({}) is None and constraint_of({"response_format": {"type": "text"}}) is None
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    found = constraint_of({"response_format": schema})
    assert (
        found is not None and found.kind is ConstraintKind.JSON_SCHEMA and json.loads(found.text) == {"type": "object"}
    )
    for bad in ({"type": "xml"}, {"type": "json_schema"}, "json"):
        with pytest.raises(UsageError, match="response_format"):
            constraint_of({"response_format": bad})


def test_response_lines_are_openais() -> None:
    found = json.loads(response_line(Answer(3, "Hello", "stop", 5, 2), _line(), "m"))
    assert found["custom_id"] == "a" and found["error"] is None and found["response"]["status_code"] == 200
    body = found["response"]["body"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["content"] == "Hello"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    failed = json.loads(response_line(Answer(3, error="too long", code="context_length_exceeded"), _line(), "m"))
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"
