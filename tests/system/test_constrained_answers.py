"""What a real model answers under a constraint, by the Python API and on the command line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

import pipo as api
from pipo.base.errors import UsageError
from pipo.engine import Engine
from pipo.generation.request import ConstraintKind, ConstraintSpec, FinishReason, SamplingParams
from pipo.text.answer_formats import read_tools
from pipo.text.call_grammar import call_grammar, forced_format
from pipo.text.tool_calls import answer_reader
from tests.support.command_line import CommandLine
from tests.support.outside_memory import peak_bytes
from tests.support.schemas import SCHEMAS

GREEDY = SamplingParams(temperature=0, max_tokens=80)
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=80)
SCHEMA = (
    '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false}'
)


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    with api.load(smollm2_path, ram=2_000_000_000, context_tokens=512, constraints=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> list[int]:
    return engine.encode_chat([{"role": "user", "content": "Tell me about Paris, in JSON."}])


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_answer_is_valid(engine: Engine, prompt: list[int], name: str, settings: SamplingParams) -> None:
    schema = SCHEMAS[name]
    spec = ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    done = engine.complete(prompt, settings, constraint=spec)
    assert done.text
    if done.finish_reason is FinishReason.STOP:
        jsonschema.validate(json.loads(done.text), schema)
    else:
        assert len(done.tokens) == 80


@pytest.mark.parametrize(
    "regex", [r"(Yes|No)\.", r"[A-Z][a-z]{2,8}, \d{1,4} km", "Paris (is|was) [^.]{5,40}\\.", "é+à"]
)
def test_every_answer_matches_its_regex(engine: Engine, prompt: list[int], regex: str) -> None:
    spec = ConstraintSpec(ConstraintKind.REGEX, regex)
    for settings in (SamplingParams(temperature=0, max_tokens=60), SamplingParams(seed=3, max_tokens=60)):
        done = engine.complete(prompt, settings, constraint=spec)
        assert done.finish_reason is FinishReason.LENGTH or re.fullmatch(regex, done.text)


def test_streamed_pieces_are_the_whole_and_the_next_answer_is_free(engine: Engine, prompt: list[int]) -> None:
    spec = ConstraintSpec(ConstraintKind.JSON_SCHEMA, SCHEMA)
    free = engine.complete(prompt, SamplingParams(temperature=0, max_tokens=12)).text
    pieces = list(engine.stream(prompt, SamplingParams(temperature=0), constraint=spec))
    assert "ok" in json.loads("".join(piece.text for piece in pieces)) and pieces[-1].finish is FinishReason.STOP
    assert engine.complete(prompt, SamplingParams(temperature=0, max_tokens=12)).text == free


def test_a_bad_one_is_refused_before_any_work(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="the regex cannot be used"):
        engine.complete(prompt, constraint=ConstraintSpec(ConstraintKind.REGEX, "(a"))


def test_forbidden_tokens_are_not_in_the_answer(engine: Engine, prompt: list[int]) -> None:
    first = engine.complete(prompt, SamplingParams(temperature=0, max_tokens=8)).token_ids
    bias = dict.fromkeys(first, -math.inf)
    other = engine.complete(prompt, SamplingParams(temperature=0, max_tokens=8, logit_bias=bias)).token_ids
    assert other and not set(other) & set(first)
    with pytest.raises(UsageError, match="token id 49152 is outside the vocabulary of 49152"):
        engine.complete(prompt, SamplingParams(logit_bias={49152: 1.0}))


def test_a_model_that_must_call_a_tool_does(engine: Engine) -> None:
    tools = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 20}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        }
    ]
    model, known = engine.model, read_tools(tools)
    rendered = model.render_chat([{"role": "user", "content": "What is the weather in Paris?"}], tools=tools)
    text = call_grammar(model.answer_format, known, model.tokenizer)
    prompt, reader = model.encode_rendered(rendered), answer_reader(forced_format(model.answer_format), known)
    spec = ConstraintSpec(ConstraintKind.GRAMMAR, text)
    calls = []
    for piece in engine.stream(prompt, SamplingParams(temperature=0), constraint=spec):
        delta = reader.feed(piece.text)
        assert delta.text == ""
        calls += delta.calls
    calls += reader.finish().calls
    (call,) = calls
    assert call.name == "get_weather" and isinstance(json.loads(call.arguments)["city"], str)


def test_control_tokens_are_shown_where_they_are_asked_for(engine: Engine, prompt: list[int]) -> None:
    spec = ConstraintSpec(ConstraintKind.GRAMMAR, 'start: "so" <[1]> "ok"')
    for shown, want in ((frozenset[int](), "sook"), (frozenset({1}), "so<|im_start|>ok")):
        pieces = engine.stream(prompt, SamplingParams(temperature=0), constraint=spec, shown=shown)
        assert "".join(piece.text for piece in pieces) == want


def test_an_engine_without_the_memory_for_it_says_so(smollm2_path: Path) -> None:
    with api.load(smollm2_path, ram=2_000_000_000, context_tokens=64) as plain:
        assert "constraints" not in plain.ledger_breakdown
        with pytest.raises(UsageError, match="keeps no memory for constraints"):
            plain.complete([1, 2], constraint=ConstraintSpec(ConstraintKind.JSON_OBJECT))


def test_the_command_line_takes_text_and_files(pipo: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    (tmp_path / "answer.lark").write_text('start: "it is " ("so" | "not so")\n')
    want = {
        ("-j", SCHEMA): r'\{\s*"ok"\s*:\s*(true|false)\s*\}\n',
        ("--json-schema", str(tmp_path / "schema.json")): r'\{\s*"ok"\s*:\s*(true|false)\s*\}\n',
        ("--grammar", str(tmp_path / "answer.lark")): "it is (not )?so\n",
        ("--regex", "[0-9]{3}"): "[0-9]{3}\n",
    }
    for flags, regex in want.items():
        ended = pipo("run", "smollm2", "Is it so?", "-q", "--seed", "1", *flags)
        assert ended.code == 0 and re.fullmatch(regex, ended.out), (ended.out, ended.err)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--regex", "(a"), "the regex cannot be used: "),
        (("-j", "{"), "the JSON schema cannot be used: it is no JSON"),
        (("-j", "nowhere.json"), "--json-schema nowhere.json: No such file or directory"),
        (("--grammar", "nowhere.lark"), "--grammar nowhere.lark: No such file or directory"),
        (("--regex", "a", "-j", "{}"), "--json-schema and --regex contradict each other"),
        (("-j", '{"not": {}}'), 'Unimplemented keys: ["not"]'),
    ],
)
def test_what_is_no_constraint_is_one_clear_error(pipo: CommandLine, flags: tuple[str, ...], said: str) -> None:
    ended = pipo("run", "smollm2", "hi", *flags)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ") and said in ended.err and "Traceback" not in ended.err


def test_a_constrained_answer_stays_under_the_smallest_budget(pipo: CommandLine) -> None:
    flags = ("smollm2", "Tell me about Paris.", "-c", "300", "-n", "60", "-j", json.dumps(SCHEMAS["nested"]))
    refused = pipo("run", *flags, "--ram", "60MB")
    smallest = re.search(
        r"the smallest --ram that works is (\S+)|the smallest --ram for this context is (\S+)", refused.err
    )
    assert refused.code == 2 and smallest and "constraints" in refused.err, refused.err
    given = (smallest[1] or smallest[2]).rstrip(".,;")
    process = pipo.start("run", *flags, "--ram", given)
    peak = peak_bytes(process)
    assert process.returncode == 0
    assert peak <= float(given.removesuffix("MiB")) * 2**20
