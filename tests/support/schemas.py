"""JSON schemas as programs send them, each with a request that a model can answer with it."""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {"type": "string", "maxLength": 40}
_WORD: dict[str, Any] = {"type": "string", "pattern": "^[A-Za-z]{1,12}$"}


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": closed(name=_TEXT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "nested": closed(person=closed(name=_TEXT, home=closed(city=_TEXT, zip={"type": "string", "pattern": "^\\d{5}$"}))),
    "enum": closed(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, 3, None, True, "large"]}),
    "const": closed(kind={"const": "person"}, version={"const": 3}, none={"const": None}),
    "array": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 4},
    "array of objects": closed(people={"type": "array", "items": closed(name=_WORD), "minItems": 1, "maxItems": 2}),
    "tuple": {"type": "array", "prefixItems": [_WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    "range": closed(ratio={"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
    "negative range": {"type": "integer", "minimum": -120, "exclusiveMaximum": -7},
    "multiple": closed(price={"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 99}),
    "pattern": closed(phone={"type": "string", "pattern": "^\\+[1-9]\\d{1,3} \\d{3}-\\d{4}$"}),
    "search pattern": closed(word={"type": "string", "pattern": "ab|cd", "maxLength": 20}),
    "date": closed(day={"type": "string", "format": "date"}),
    "uuid": closed(id={"type": "string", "format": "uuid"}),
    "oneOf": {
        "oneOf": [
            closed(kind={"const": "cat"}, name=_WORD),
            closed(kind={"const": "dog"}, age={"type": "integer", "minimum": 1, "maximum": 20}),
        ]
    },
    "anyOf": closed(value={"anyOf": [{"type": "null"}, {"type": "boolean"}, _WORD]}),
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"b": {"enum": [1, 2]}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "reference": {
        "$defs": {"node": closed(value=_WORD, flag={"type": "boolean"})},
        **closed(left={"$ref": "#/$defs/node"}, right={"$ref": "#/$defs/node"}),
    },
    "recursion": {
        "$defs": {"list": {"anyOf": [{"type": "null"}, closed(head={"enum": [0, 1]}, tail={"$ref": "#/$defs/list"})]}},
        "$ref": "#/$defs/list",
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "integer", "minimum": 0, "maximum": 9}, "c": _WORD},
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99}},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "several types": closed(
        value={"type": ["string", "integer", "null"], "maxLength": 10, "minimum": 0, "maximum": 50}
    ),
    "unicode": closed(grüße={"enum": ["schön", "日本語", "🙂 ok", "naïve\n", '"quoted" \\ back']}, 名前=_WORD),
    "unicode pattern": closed(word={"type": "string", "pattern": "^[àéîöü]{2,6}$"}),
    "lengths": closed(code={"type": "string", "minLength": 3, "maxLength": 5}),
    "described": closed(
        description={"type": "boolean", "description": "a flag"}, title={"const": {"description": "kept"}}
    ),
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "text": {"type": "string", "maxLength": 12},
}
