"""From a ConstraintSpec to the grammar that llguidance reads, with what it does not bound itself refused here.

llguidance bounds nesting, the size of grammars and the work of a step. Measured with hostile texts, what is left is
the length of the text (memory and seconds grow with it) and `multipleOf`: its automaton has a state for each multiple,
0.4 KB and 4 µs each, so 99999989 would take 40 GB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import NoReturn

from pipo.base.errors import UsageError
from pipo.generation.request import ConstraintKind, ConstraintSpec

MAX_TEXT_BYTES = 256 << 10
MAX_SCHEMA_BYTES = 32 << 10  # without what only describes; all of a Lark grammar's together
MAX_PATTERN_BYTES = 8 << 10  # of a schema
MAX_GRAMMAR_BYTES = 16 << 10  # of a regex, and of a Lark grammar besides its %json blocks
MAX_INTERSECTIONS = 3
MAX_MULTIPLE = 10_000
_ANNOTATIONS = {"description", "title", "$comment"}
_VALUES = {"const", "enum", "default", "examples"}  # hold values, not schemas
# a space, or a new line and its indentation: without a bound small models write white space to the end of the context
_WHITESPACE = r"( |\n[ \t]{0,40})"
_JSON_BLOCK = re.compile(r"%json\s*")
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//[^\n]*')  # of Lark: strings, regexes, comments
_NAMES = {
    ConstraintKind.JSON_OBJECT: "JSON object",
    ConstraintKind.JSON_SCHEMA: "JSON schema",
    ConstraintKind.REGEX: "regex",
    ConstraintKind.GRAMMAR: "grammar",
}


def name_of(kind: ConstraintKind) -> str:
    return _NAMES[kind]


def grammar_of(spec: ConstraintSpec) -> str:
    """What llguidance makes a matcher of. Raises UsageError for what is too long or no JSON; the rest it finds."""
    from llguidance import LLMatcher

    _check_length(spec.kind, spec.text, MAX_TEXT_BYTES)
    try:
        spec.text.encode()
    except UnicodeEncodeError:
        refuse(spec.kind, "it has a lone surrogate, which is no character")
    if spec.kind is ConstraintKind.REGEX:
        _check_length(spec.kind, spec.text, MAX_GRAMMAR_BYTES)
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind is ConstraintKind.GRAMMAR:
        return LLMatcher.grammar_from_lark(_checked_lark(spec.text))
    schema = '{"type":"object"}' if spec.kind is ConstraintKind.JSON_OBJECT else _checked_schema(spec.text)
    try:
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _WHITESPACE})
    except ValueError as error:  # nested too deep
        refuse(spec.kind, f"{error!s:.200}")


def refuse(kind: ConstraintKind, why: str, hint: str | None = None) -> NoReturn:
    raise UsageError(f"the {name_of(kind)} cannot be used: {why}", hint=hint)


def _checked_schema(text: str) -> str:
    """The same without what only describes."""
    kind = ConstraintKind.JSON_SCHEMA
    try:
        schema = _without_annotations(json.loads(text, parse_constant=_no_number))
    except RecursionError:
        refuse(kind, "it is nested too deep")
    except ValueError as error:
        refuse(kind, f"it is no JSON: {error!s:.200}")
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        why = "nothing is valid by it" if schema is False else f"it must be an object, not {text.strip()!r:.40}"
        refuse(kind, why)
    _check_schemas(kind, [schema])
    return json.dumps(schema, separators=(",", ":"))


def _without_annotations(schema: object) -> object:
    if isinstance(schema, list):
        return [_without_annotations(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _VALUES else _without_annotations(value)
        for key, value in schema.items()
        if key not in _ANNOTATIONS or not isinstance(value, str)  # a property may have this name
    }


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_schemas(kind: ConstraintKind, schemas: list[object]) -> None:
    """How long they are together, their patterns, and the multiples that one number may have to be of."""
    num_bytes = sum(len(json.dumps(schema, separators=(",", ":"))) for schema in schemas)
    if num_bytes > MAX_SCHEMA_BYTES:
        refuse(kind, f"its schema has {num_bytes} bytes without descriptions, at most {MAX_SCHEMA_BYTES} can be")
    pattern_bytes, multiples = 0, []
    for key, value in _members(schemas):
        if key == "multipleOf":
            multiples.append(_multiple(kind, value))
        elif key == "pattern" and isinstance(value, str):
            pattern_bytes += _num_bytes(value)
        elif key == "patternProperties" and isinstance(value, dict):
            pattern_bytes += sum(map(_num_bytes, value))
    if pattern_bytes > MAX_PATTERN_BYTES:
        refuse(kind, f"its patterns have {pattern_bytes} bytes, at most {MAX_PATTERN_BYTES} can be")
    _check_multiples(kind, multiples)


def _members(value: object) -> Iterator[tuple[str, object]]:
    """Every key of every object, at any depth, without recursion."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _multiple(kind: ConstraintKind, value: object) -> Decimal:
    try:
        multiple = Decimal(str(value))
    except InvalidOperation:
        multiple = Decimal(0)
    if isinstance(value, bool) or not multiple.is_finite() or multiple <= 0:
        refuse(kind, f"multipleOf is {value!r:.40}, wanted a number above 0")
    return multiple


def _check_multiples(kind: ConstraintKind, multiples: list[Decimal]) -> None:
    """All at once: `allOf` and `$ref` may bring any of them together on one number, which needs as many states as
    the least common multiple of their digits (1000 has 1000, 0.05 has 5).
    """
    if any(not -12 <= multiple.adjusted() <= 12 for multiple in multiples):
        refuse(kind, "multipleOf takes numbers from 1e-12 to 1e12")
    num_states = math.lcm(*map(_digits, multiples))
    if num_states > MAX_MULTIPLE:
        found = " and ".join(sorted({str(multiple) for multiple in multiples})[:4])
        refuse(kind, f"multipleOf {found:.80} needs {num_states:.3g} states, at most {MAX_MULTIPLE} can be")


def _digits(multiple: Decimal) -> int:
    exponent = multiple.normalize().as_tuple().exponent
    return int(multiple.scaleb(-min(exponent, 0)) if isinstance(exponent, int) else multiple)


def _checked_lark(text: str) -> str:
    """Raises UsageError for its length, and for what is wrong with a `%json` block."""
    kind, rest, end, schemas = ConstraintKind.GRAMMAR, "", 0, []
    for found in _JSON_BLOCK.finditer(text):
        if found.start() < end:
            continue  # in the block before
        try:
            schema, block_end = json.JSONDecoder().raw_decode(text, found.end())
        except RecursionError:
            refuse(kind, "its schema is nested too deep")
        except ValueError:  # in a comment or a string, or llguidance says what is wrong with it
            continue
        schemas.append(schema)
        rest += text[end : found.end()]
        end = block_end
    rest += text[end:]
    _check_schemas(kind, schemas)
    _check_length(kind, rest, MAX_GRAMMAR_BYTES)
    num_intersections = _LITERAL.sub("", rest).count("&")
    if num_intersections > MAX_INTERSECTIONS:  # 19 of them took 113 MB
        refuse(kind, f"it has {num_intersections} intersections (&), at most {MAX_INTERSECTIONS} can be")
    return text


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _check_length(kind: ConstraintKind, text: str, most: int) -> None:
    num_bytes = _num_bytes(text)
    if num_bytes > most:
        raise UsageError(f"the {name_of(kind)} has {num_bytes} bytes, at most {most} can be")
