"""What stands between the markers of tool calls, read into names and arguments; None where it is no such thing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from pipo.text.answer_formats import Tool, ToolFormat

_MAX_DEPTH = 64


class ReadCall(NamedTuple):
    """`id` is the model's own, where it gives one."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


def read_calls(format: ToolFormat, text: str, tools: Mapping[str, Tool]) -> list[ReadCall] | None:
    """All calls of `text`, in order; None where any of it is something else. `tools` say of what type values are."""
    try:
        calls = list(_READERS[format.body](format, text.strip(), tools))
    except (ValueError, RecursionError):
        return None
    return calls or None


def _read_json(format: ToolFormat, text: str, tools: Mapping[str, Tool]) -> Iterator[ReadCall]:
    """Objects or arrays of them, with nothing but white space, commas and semicolons between."""
    end = 0
    while end < len(text):
        value, end = _DECODER.raw_decode(text, end)
        for each in value if isinstance(value, list) else [value]:
            yield _call_of(each)
        between = _BETWEEN.match(text, end)
        end = between.end() if between else end


def _call_of(value: object) -> ReadCall:
    if not isinstance(value, dict):
        raise ValueError("no object")
    if isinstance(value.get("function"), dict):
        value = {**value, **value["function"]}
    name = value.get("name", value.get("function"))
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments or {}, dict):
        raise ValueError("no call")
    call_id = value.get("id")
    return ReadCall(name, arguments or {}, call_id if isinstance(call_id, str) and call_id else None)


def _read_named(format: ToolFormat, text: str, tools: Mapping[str, Tool]) -> Iterator[ReadCall]:
    """Mistral's: a JSON array, and since 2025 NAME[CALL_ID]ID[ARGS]{…}, each after a marker of its own."""
    for part in filter(None, map(str.strip, text.split(format.begin))):
        if part.startswith(("[", "{")):
            yield from _read_json(format, part, tools)
            continue
        id_marker, marker = format.inner
        head, found, arguments = part.partition(marker)
        if not found:  # the marker may have been left out
            cut = part.find("{")
            head, arguments = part[: max(cut, 0)], part[max(cut, 0) :]
        name, _, call_id = head.partition(id_marker)
        yield _named(name, arguments, call_id.strip() or None)


def _named(name: str, arguments: str, call_id: str | None = None) -> ReadCall:
    value = _DECODER.decode(arguments.strip() or "{}")
    if not name.strip() or not isinstance(value, dict):
        raise ValueError("no call")
    return ReadCall(name.strip(), value, call_id)


def _read_fenced(format: ToolFormat, text: str, tools: Mapping[str, Tool]) -> Iterator[ReadCall]:
    """DeepSeek's: `function SEP NAME` and a block of JSON (V3, R1), or `NAME SEP JSON` (V3.1)."""
    begin, separator, end = format.inner
    for part in filter(None, map(str.strip, text.split(begin))):
        head, found, rest = part.partition(separator)
        rest = rest.strip().removesuffix(end).strip()
        if not found:
            raise ValueError("no separator")
        name, fence, block = rest.partition("```")
        if fence and not name.lstrip().startswith("{"):
            yield _named(name, block.removesuffix("```").removeprefix("json"))
        else:
            yield _named(head, rest)


def _read_xml(format: ToolFormat, text: str, tools: Mapping[str, Tool]) -> Iterator[ReadCall]:
    """Qwen's coder models': values are text, or JSON where the tool's schema says that they are none."""
    for name, inner in _elements(text, "function"):
        schema = tools[name].parameters if name in tools else {}
        yield ReadCall(name, {key: _typed(_lines(value), schema, key) for key, value in _elements(inner, "parameter")})


def _elements(text: str, tag: str) -> Iterator[tuple[str, str]]:
    """Names and contents of `<tag=NAME>…</tag>`, with nothing but white space between."""
    at, opening, closing = _skip(text, 0), f"<{tag}=", f"</{tag}>"
    while at < len(text):
        if not text.startswith(opening, at):
            raise ValueError("text between")
        name_end = text.index(">", at)
        end = text.index(closing, name_end)
        yield text[at + len(opening) : name_end].strip(), text[name_end + 1 : end]
        at = _skip(text, end + len(closing))


def _lines(value: str) -> str:
    """Without the line ends that belong to the tags."""
    return value.removeprefix("\n").removesuffix("\n")


def _typed(value: str, schema: Mapping[str, Any], key: str) -> Any:
    properties = schema.get("properties")
    kind = properties.get(key) if isinstance(properties, Mapping) else None
    if isinstance(kind, Mapping) and kind.get("type") == "string":
        return value
    try:
        return _DECODER.decode(value.strip())
    except ValueError:
        return value


def _read_bare(format: ToolFormat, text: str, tools: Mapping[str, Tool]) -> Iterator[ReadCall]:
    """Gemma's: `call:NAME{key:value}`, one after the other."""
    at = 0
    while at < len(text):
        found = _CALL.match(text, at)
        if found is None:
            raise ValueError("no call")
        value, end = _bare_value(text, found.end() - 1, format.quote, 0)
        yield ReadCall(found[1], value)
        at = _skip(text, end)


def _bare_value(text: str, at: int, quote: str, depth: int) -> tuple[Any, int]:
    """The value at `at`, and where it ends."""
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    if text[at : at + 1] in ("{", "["):
        return _bare_items(text, at, quote, depth)
    found = _SCALAR.match(text, at)
    if found is None:
        value, end = _DECODER.raw_decode(text, at)
        return value, end
    return _DECODER.decode(found[0]), found.end()


def _bare_items(text: str, at: int, quote: str, depth: int) -> tuple[Any, int]:
    closing, table, items = {"{": "}", "[": "]"}[text[at]], {}, []
    at = _skip(text, at + 1)
    while not text.startswith(closing, at):
        key = ""
        if closing == "}":
            key, at = _bare_key(text, at, quote)
        value, at = _bare_value(text, at, quote, depth + 1)
        table[key] = value
        items.append(value)
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith(closing, at):
            raise ValueError("no comma")
    return (table if closing == "}" else items), at + 1


def _bare_key(text: str, at: int, quote: str) -> tuple[str, int]:
    if text.startswith(quote, at) or text.startswith('"', at):
        key, at = _bare_value(text, at, quote, 0)
        at = _skip(text, at)
        if not text.startswith(":", at):
            raise ValueError("no colon")
        return str(key), _skip(text, at + 1)
    end = text.index(":", at)
    key = text[at:end].strip()
    if not key or any(mark in key for mark in "{}[],"):
        raise ValueError("no key")
    return key, _skip(text, end + 1)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_BETWEEN = re.compile(r"[\s;,]*")
_CALL = re.compile(r"call:\s*([\w.-]+)\s*\{")
_SCALAR = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_Reader = Callable[[ToolFormat, str, Mapping[str, Tool]], Iterator[ReadCall]]
_READERS: Mapping[str, _Reader] = {
    "json": _read_json,
    "named": _read_named,
    "fenced": _read_fenced,
    "xml": _read_xml,
    "bare": _read_bare,
}
