"""Answers under a constraint are what it asks for, whatever the model would rather say. No model is needed for that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import numpy as np
import pytest

from pipo.base.errors import ComputeError, UsageError
from pipo.generation.constraints import NO_TEXT, Constraint, Grammars, check_constraint
from pipo.generation.grammar_tokens import TokenTexts
from pipo.generation.request import ConstraintKind, ConstraintSpec, FinishReason
from pipo.generation.sampling import NOTHING_FOLLOWS
from pipo.text.contract import ModelTokenizer
from pipo.text.tokenizer import Tokenizer
from tests.support.constrained import TOKENIZERS, answer_at_random, tokenizer_of
from tests.support.hostile_constraints import hostile_constraints
from tests.support.schemas import SCHEMAS
from tests.support.vocabularies import byte_pair_metadata


@dataclass(frozen=True, slots=True)
class Rig:
    tokenizer: ModelTokenizer
    num_rows: int
    grammars: Grammars

    def answer(self, spec: ConstraintSpec, seed: int = 1, **settings: Any) -> tuple[str, FinishReason, list[int]]:
        return answer_at_random(self.tokenizer, self.num_rows, self.grammars, spec, seed, **settings)

    def allowed(self, constraint: Constraint, **settings: bool) -> set[int]:
        scores = constraint.apply(np.zeros(self.num_rows, np.float32), **settings)
        return set(np.flatnonzero(scores > -np.inf).tolist())


@pytest.fixture(scope="module", params=TOKENIZERS)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    tokenizer, num_rows = tokenizer_of(request.param, tmp_path_factory.mktemp("tokenizer"))
    return Rig(tokenizer, num_rows, Grammars(tokenizer, num_rows))


@pytest.fixture(scope="module")
def bytes_rig() -> Iterator[Rig]:
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata())
    yield Rig(tokenizer, tokenizer.vocab_size, Grammars(tokenizer, tokenizer.vocab_size))


def schema_spec(schema: object) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def can_spell(tokenizer: ModelTokenizer, text: str) -> bool:
    """Some of the small vocabularies lack letters."""
    ids = tokenizer.encode_part(text)
    return b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_valid_by_their_schema(rig: Rig, name: str) -> None:
    schema, num_finished = SCHEMAS[name], 0
    for seed in range(3):
        try:
            text, finish, _ = rig.answer(schema_spec(schema), seed, temperature=0 if seed == 0 else 1.0)
        except UsageError as error:
            assert error.message in (NOTHING_FOLLOWS, f"the JSON schema cannot be used: {NO_TEXT}")
            assert not can_spell(rig.tokenizer, '{"[0123456789]}' + json.dumps(schema, ensure_ascii=False))
            continue
        if finish is FinishReason.STOP:
            num_finished += 1
            jsonschema.validate(json.loads(text), schema)
    assert num_finished or not can_spell(rig.tokenizer, '{"[0123456789]}')


def test_any_json_object(rig: Rig) -> None:
    if not can_spell(rig.tokenizer, '{"[0123456789]}'):
        return
    finished = [rig.answer(ConstraintSpec(ConstraintKind.JSON_OBJECT), seed) for seed in range(12)]
    texts = [text for text, finish, _ in finished if finish is FinishReason.STOP]
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(
    "regex",
    [
        r"(Yes|No)\.",
        r"[a-z]{3,10}@[a-z]+\.(com|org)",
        "^[0-9]{4}-[0-9][0-9]$",
        " ?[A-C]",
        " the end",
        "a|",
        r"\s{2}x",
        "[^a]{2}",
    ],
)
def test_answers_match_their_regex_from_end_to_end(rig: Rig, regex: str) -> None:
    if not can_spell(rig.tokenizer, "(Yes|No)a2@-ABC x"):
        return
    for seed in range(6):
        text, finish, _ = rig.answer(ConstraintSpec(ConstraintKind.REGEX, regex), seed)
        assert finish is FinishReason.LENGTH or re.fullmatch(regex, text), repr(text)


def test_a_grammar(rig: Rig) -> None:
    spec = ConstraintSpec(
        ConstraintKind.GRAMMAR, 'start: sum "=" NUMBER\nsum: NUMBER ("+" NUMBER)+\nNUMBER: /[0-9]{1,3}/'
    )
    for seed in range(4 if can_spell(rig.tokenizer, "0123456789+=") else 0):
        text, finish, _ = rig.answer(spec, seed)
        assert finish is FinishReason.LENGTH or re.fullmatch(r"\d{1,3}(\+\d{1,3})+=\d{1,3}", text)


def test_control_tokens_are_never_part_of_a_text(rig: Rig) -> None:
    constraint = rig.grammars.constraint(ConstraintSpec(ConstraintKind.REGEX, r"(.|\n)*x"))
    hidden = {i for i in range(rig.num_rows) if rig.tokenizer.is_hidden(i)}
    assert hidden and not rig.allowed(constraint) & hidden


def test_the_end_is_allowed_exactly_where_the_answer_is_whole(rig: Rig) -> None:
    constraint = rig.grammars.constraint(ConstraintSpec(ConstraintKind.REGEX, "ab?"))
    ends, texts = set(rig.tokenizer.end_ids), TokenTexts(rig.tokenizer, rig.num_rows)
    assert ends and not rig.allowed(constraint) & ends and not constraint.is_whole
    constraint.take(next(i for i in rig.allowed(constraint) if texts[i] == b"a"))
    assert rig.allowed(constraint) >= ends and constraint.is_whole and not constraint.is_finished
    assert {texts[i] for i in rig.allowed(constraint) - ends} == {b"b"}
    assert {texts[i] for i in rig.allowed(constraint, goes_on=True)} == {b"b"}
    constraint.take(next(i for i in rig.allowed(constraint) - ends))
    assert constraint.is_finished


def test_rows_that_no_token_has_are_never_chosen() -> None:
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata())
    num_rows = tokenizer.vocab_size + 40
    constraint = Grammars(tokenizer, num_rows).constraint(ConstraintSpec(ConstraintKind.REGEX, r"(.|\n)*"))
    scores = constraint.apply(np.zeros(num_rows, np.float32))
    assert (scores[tokenizer.vocab_size :] == -np.inf).all() and scores[: tokenizer.vocab_size].max() == 0


def test_an_answer_cut_by_its_length_keeps_its_text(bytes_rig: Rig) -> None:
    text, finish, tokens = bytes_rig.answer(schema_spec(SCHEMAS["nested"]), max_tokens=3)
    assert (finish, len(tokens)) == (FinishReason.LENGTH, 3)
    assert text and '{"person":'.startswith(text[:3].replace(" ", "").replace("\n", ""))


def test_the_last_token_allowed_may_be_the_last_of_the_constraint(bytes_rig: Rig) -> None:
    spec = ConstraintSpec(ConstraintKind.REGEX, "[ab][ab]")
    text, finish, tokens = bytes_rig.answer(spec, 3)
    assert bytes_rig.answer(spec, 3, max_tokens=len(tokens)) == (text, finish, tokens) and finish is FinishReason.STOP


def test_an_empty_answer_can_be_the_whole(bytes_rig: Rig) -> None:
    assert bytes_rig.answer(ConstraintSpec(ConstraintKind.REGEX, "")) == ("", FinishReason.STOP, [])


def test_ignoring_the_end_goes_on_while_the_constraint_can(bytes_rig: Rig) -> None:
    spec = ConstraintSpec(ConstraintKind.REGEX, "[a-z]{1,40}")
    text, finish, _ = bytes_rig.answer(spec, ignore_eos=True)
    assert (len(text), finish) == (40, FinishReason.STOP)


def test_the_text_before_what_is_awaited_is_free(bytes_rig: Rig) -> None:
    tokenizer = bytes_rig.tokenizer
    constraint = bytes_rig.grammars.constraint(ConstraintSpec(ConstraintKind.REGEX, "ok", after="</think>"))
    free = bytes_rig.allowed(constraint)
    assert len(free) == bytes_rig.num_rows - len(tokenizer.end_ids)
    for token_id in tokenizer.encode_part("so, ok</thi"):
        constraint.take(token_id)
    assert bytes_rig.allowed(constraint) == free and not constraint.is_finished
    for token_id in tokenizer.encode_part("nk>"):
        constraint.take(token_id)
    assert {tokenizer.token_bytes(i) for i in bytes_rig.allowed(constraint)} <= {b"o", b"ok"}


def test_a_token_that_was_forbidden_is_our_own_error(bytes_rig: Rig) -> None:
    constraint = bytes_rig.grammars.constraint(ConstraintSpec(ConstraintKind.REGEX, "b"))
    with pytest.raises(ComputeError, match="against the regex"):
        constraint.take(bytes_rig.tokenizer.encode_part("a")[0])


def test_two_answers_of_one_grammar_do_not_know_each_other(bytes_rig: Rig) -> None:
    first, second = (bytes_rig.grammars.constraint(ConstraintSpec(ConstraintKind.REGEX, "ab|cd")) for _ in range(2))
    before = bytes_rig.allowed(second)
    first.prepare()
    first.take(bytes_rig.tokenizer.encode_part("c")[0])
    assert bytes_rig.allowed(second) == before != bytes_rig.allowed(first)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (ConstraintKind.REGEX, "(a", "unclosed group"),
        (ConstraintKind.REGEX, "a(?=b)", "look-around"),
        (ConstraintKind.GRAMMAR, "start: nothing", 'unknown name: "nothing"'),
        (ConstraintKind.GRAMMAR, "", "Empty grammar"),
        (ConstraintKind.JSON_SCHEMA, "{", "it is no JSON"),
        (ConstraintKind.JSON_SCHEMA, "[]", "it must be an object"),
        (ConstraintKind.JSON_SCHEMA, '{"type": "strin"}', "strin"),
        (ConstraintKind.JSON_SCHEMA, '{"not": {}}', 'Unimplemented keys: ["not"]'),
        (ConstraintKind.JSON_SCHEMA, "false", "nothing is valid by it"),
        (ConstraintKind.JSON_SCHEMA, '{"multipleOf": 0}', "multipleOf is 0"),
        (ConstraintKind.JSON_SCHEMA, '{"multipleOf": 1e-300}', "multipleOf takes numbers from"),
        (ConstraintKind.JSON_SCHEMA, '{"const": "\\ud800"}', "hex escape"),
    ],
)
def test_what_is_no_constraint_is_refused_with_the_reason(
    bytes_rig: Rig, kind: ConstraintKind, text: str, said: str
) -> None:
    for make in (bytes_rig.grammars.constraint, check_constraint):
        with pytest.raises(UsageError, match=re.escape(said)) as caught:
            make(ConstraintSpec(kind, text))
        assert "\n" not in caught.value.message and len(caught.value.message) < 500


def test_what_the_model_cannot_write_ends_the_answer() -> None:
    """Byte pairs without the token of a byte: published models lack some."""
    metadata = byte_pair_metadata()
    tokens = ["[gone]" if token == "~" else token for token in metadata.strings("tokenizer.ggml.tokens")]
    tokenizer = Tokenizer.from_metadata(metadata.changed({"tokens": tokens}))
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    with pytest.raises(UsageError, match=NOTHING_FOLLOWS):
        answer_at_random(tokenizer, tokenizer.vocab_size, grammars, ConstraintSpec(ConstraintKind.REGEX, "a~~b"), 0)


@pytest.mark.parametrize("multiple", [0.01, 1000, 0.05, 0.0001])
def test_multiples_that_are_usual(bytes_rig: Rig, multiple: float) -> None:
    bytes_rig.grammars.constraint(
        schema_spec({"properties": {"a": {"multipleOf": multiple}, "b": {"multipleOf": 0.5}}})
    )


def test_descriptions_cost_nothing_and_values_keep_theirs(bytes_rig: Rig) -> None:
    long = {"description": "x" * 100_000, "const": {"description": "kept"}}
    text, _, _ = bytes_rig.answer(schema_spec(long))
    assert json.loads(text) == {"description": "kept"}


@pytest.mark.parametrize("name", hostile_constraints())
def test_hostile_ones_end_in_an_error_or_go_on(bytes_rig: Rig, name: str) -> None:
    """One clear error each, before the first token or at one of the next; that the process lives is the point."""
    try:
        _, finish, _ = bytes_rig.answer(hostile_constraints()[name], max_tokens=40)
    except UsageError as error:
        assert 0 < len(error.message) < 500
    else:
        assert finish in (FinishReason.LENGTH, FinishReason.STOP)
