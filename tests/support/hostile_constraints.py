"""Constraints that are made to cost: too deep, too long, too many alternatives, automata that explode."""

from __future__ import annotations

import json

from pipo.generation.grammar_text import MAX_GRAMMAR_BYTES
from pipo.generation.request import ConstraintKind, ConstraintSpec

_SCHEMA, _REGEX, _GRAMMAR = ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.GRAMMAR


def hostile_constraints() -> dict[str, ConstraintSpec]:
    """By name. Some can be followed for a while; none may take the process down, or more memory than is declared."""
    texts = {
        **{name: (_SCHEMA, json.dumps(schema, separators=(",", ":"))) for name, schema in _schemas().items()},
        **{name: (_SCHEMA, text) for name, text in _schema_texts().items()},
        **{name: (_REGEX, text) for name, text in _regexes().items()},
        **{name: (_GRAMMAR, text) for name, text in _grammars().items()},
    }
    return {name: ConstraintSpec(kind, text) for name, (kind, text) in texts.items()}


def _schemas() -> dict[str, object]:
    number, text = {"type": "integer"}, {"type": "string"}
    doubling = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(24)}
    choices = [{"anyOf": [{"properties": {f"p{i}_{j}": {"const": j}}} for j in range(8)]} for i in range(8)]
    names = [f"p{i}" for i in range(950)]
    return {
        "many values": {"enum": [f"v{i}" for i in range(3500)]},
        "too many values": {"enum": [f"v{i}" for i in range(100_000)]},
        "many optional": {"type": "object", "properties": {f"p{i}": number for i in range(1100)}},
        "many required": {"type": "object", "properties": dict.fromkeys(names, number), "required": names},
        "many patterns": {"properties": {f"p{i}": {"pattern": f"^(.*a.{{20}}){i}$"} for i in range(230)}},
        "many ranges": {"anyOf": [{"type": "integer", "minimum": 7 * i, "maximum": 10**9 + i} for i in range(500)]},
        "doubling references": {"$defs": {**doubling, "a24": text}, "$ref": "#/$defs/a0"},
        "product of choices": {"allOf": choices},
        "a million items": {"type": "array", "items": text, "minItems": 1_000_000},
        "a million letters": {"type": "string", "minLength": 100_000, "maxLength": 1_000_000},
        "one large multiple": {"type": "integer", "multipleOf": 99_999_989},
        "multiples together": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]},
        "the largest multiple": {"type": "integer", "multipleOf": 9_973},
        "long prefix": {"type": "array", "prefixItems": [text] * 1600},
        "intersections": {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(1, 9)]},
        "nobody's reference": {"$ref": "http://example.com/x.json"},
        "no reference": {"$ref": "#/$defs/none"},
    }  # fmt: skip


def _schema_texts() -> dict[str, str]:
    return {
        "itself": '{"$ref":"#"}',
        "a circle": '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}',
        "deep": '{"items":' * 60 + "{}" + "}" * 60,
        "deeper": '{"items":' * 400 + "{}" + "}" * 400,
        "half a character": '{"const":"\ud800"}',
        "half an escaped character": '{"const":"\\ud800"}',
        "not a number": '{"const":NaN}',
        "deepest": '{"items":' * 6000 + "{}" + "}" * 6000,
        "brackets": "[" * 30_000,
    }


def _regexes() -> dict[str, str]:
    return {
        "nested repeats": "((a{1,1000}){1,1000}){1,1000}",
        "repeats of repeats": "(a{500}){500}",
        "a choice in the past": "(a|b)*a(a|b){200}",
        "far looks back": "(.*a.{20}){5}",
        "letters": r"(\p{L}{1,50}[\s\S]){1,100}",
        "classes": "|".join(rf"\p{{Lu}}{i}\p{{Ll}}" for i in range(900)),
        "parentheses": "(" * 200 + "a" + ")" * 200,
        "more parentheses": "(" * 8000 + "a" + ")" * 8000,
        "words": "(?i)" + "|".join(f"word{i}" for i in range(1700)),
        "too long": "a" * (MAX_GRAMMAR_BYTES + 1),
    }


def _grammars() -> dict[str, str]:
    doubling = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40))
    terminals = "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(30))
    intersection = " & ".join(f"/(.*a.{{{i}}}.*)/" for i in range(1, 20))
    return {
        "doubling rules": f'start: r0\n{doubling}\nr40: "a"',
        "doubling terminals": f'start: T0\n{terminals}\nT30: "a"',
        "ambiguous": 'start: start start | "a" | ',
        "many options": "start: " + "x? " * 5000 + '\nx: "a" "b"',
        "many rules": "start: " + " | ".join(f"x y{i}" for i in range(600)) + '\nx: "a" "b"\n'
        + "\n".join(f'y{i}: "c{i}"' for i in range(600)),
        "nested groups": "start: " + "(" * 3000 + '"a"' + ")" * 3000,
        "counted": 'start: x{100000,1000000}\nx: "a" y{10000,1000000}\ny: "c" "d"',
        "intersection": f"start: X\nX: {intersection}",
        "deep intersection": "start: X\nX: " + " & ".join(f"/(.*{c}.{{300}}.*)/" for c in "abc"),
        "long intersection": "start: X\nX: " + " & ".join(f"/({c}|[^{c}]{{90}}.*x){{9}}.*/" for c in "abcd"),
        "complement": "start: X\nX: ~/(.*a.{30}.*)/",
        "many terminals": "start: " + " | ".join(f"X{i}" for i in range(300)) + "\n"
        + "\n".join(f"X{i}: /.*a.{{{i}}}.*/" for i in range(300)),
        "substrings": 'start: X\nX: %regex {"substring_chars": "' + "ab" * 7000 + '"}',
        "a hidden multiple": 'start: x\nx: %json {"type": "integer", "multiple\\u004ff": 99999989}',
        "unknown special token": 'start: <|nobody|> "a"',
        "a file": '%import "/etc/passwd"\nstart: "a"',
    }  # fmt: skip
