"""A model that must call a tool writes a call that its own format reads, whatever it would rather say."""

from __future__ import annotations

import json

import jsonschema
import pytest

from pipo.base.errors import UsageError
from pipo.generation.constraints import Grammars
from pipo.generation.request import ConstraintKind, ConstraintSpec, FinishReason
from pipo.text.answer_formats import answer_format_of, hidden_markers, read_tools
from pipo.text.call_grammar import call_grammar, forced_format
from pipo.text.tokenizer import Tokenizer
from pipo.text.tool_calls import answer_reader
from tests.support.constrained import answer_at_random
from tests.support.vocabularies import byte_pair_metadata
from tests.unit.test_tool_calls import TEMPLATES

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rom\"a"]}, "at": {"$ref": "#/$defs/hour"}},
    "required": ["city", "at"],
    "additionalProperties": False,
    "$defs": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}},
}  # fmt: skip
TOOLS = read_tools(
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "now"}},
    ]
)


def tokenizer_with(*control: str) -> Tokenizer:
    """Byte pairs, and these as control tokens."""
    metadata = byte_pair_metadata()
    tokens, kinds = metadata.strings("tokenizer.ggml.tokens"), list(metadata.array("tokenizer.ggml.token_type"))
    return Tokenizer.from_metadata(
        metadata.changed({"tokens": [*tokens, *control], "token_type": [*kinds, *[3] * len(control)]})
    )


@pytest.mark.parametrize("has_control_tokens", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_forced_calls_are_read_back(family: str, has_control_tokens: bool) -> None:
    format = answer_format_of(TEMPLATES[family])
    tokenizer = tokenizer_with(*(format.markers if has_control_tokens else ()))
    shown = hidden_markers(format, tokenizer)
    is_shown_anyway = family == "harmony"  # as llama.cpp has it
    assert len(shown) == (len(set(format.markers)) if has_control_tokens and not is_shown_anyway else 0)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    text = call_grammar(format, TOOLS[:1], tokenizer)
    for seed in range(3):
        spec = ConstraintSpec(ConstraintKind.GRAMMAR, text)
        answer, finish, _ = answer_at_random(tokenizer, tokenizer.vocab_size, grammars, spec, seed, shown=shown)
        assert finish is FinishReason.STOP, answer
        reader = answer_reader(forced_format(format), TOOLS)
        first, last = reader.feed(answer), reader.finish()
        assert first.text + last.text == "", answer
        (call,) = [*first.calls, *last.calls]
        assert call.name == "get_weather"
        jsonschema.validate(json.loads(call.arguments), SCHEMA)


@pytest.mark.parametrize("family", ["hermes", "mistral", "mistral by name", "llama 3", "phi 4", "deepseek"])
def test_several_calls_of_any_tool(family: str) -> None:
    format, tokenizer = answer_format_of(TEMPLATES[family]), tokenizer_with()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    spec = ConstraintSpec(ConstraintKind.GRAMMAR, call_grammar(format, TOOLS, tokenizer, is_several=True))
    names, counts = set(), set()
    for seed in range(12):
        answer, finish, _ = answer_at_random(tokenizer, tokenizer.vocab_size, grammars, spec, seed, max_tokens=600)
        if finish is FinishReason.STOP:
            reader = answer_reader(format, TOOLS)
            calls = [*reader.feed(answer).calls, *reader.finish().calls]
            names |= {call.name for call in calls}
            counts.add(len(calls))
    assert names == {"get_weather", "now"} and 0 not in counts
    assert max(counts) > 1 or family == "mistral by name"  # where the dice would have to spell a marker


def test_a_tool_is_needed() -> None:
    with pytest.raises(UsageError, match="there is no tool to call"):
        call_grammar(answer_format_of(None), [], tokenizer_with())


@pytest.mark.parametrize(
    "tools", [[{}], [{"function": {"name": ""}}], [{"function": {"name": "f", "parameters": []}}], [3]]
)
def test_what_is_no_tool(tools: list[object]) -> None:
    if tools == [{"function": {"name": "f", "parameters": []}}]:
        assert read_tools(tools)[0].parameters["type"] == "object"  # empty is none
        return
    with pytest.raises(UsageError, match=r"tools\[0\] is no function with a name"):
        read_tools(tools)
