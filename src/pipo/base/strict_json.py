"""JSON into frozen dataclasses: every key known, none missing, every value of its field's type, no NaN."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pipo.base.errors import MalformedProfile

T = TypeVar("T")
_WHOLE = "the profile"


def parse(text: str | bytes) -> object:
    """JSON without its extensions (NaN, Infinity) and without a key twice. Raises MalformedProfile."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise MalformedProfile(_WHOLE, "JSON", str(error)) from error


def decode(kind: type[T], value: object, key: str = "") -> T:
    """`value` as a `kind`: a dataclass, int, float, bool, str, None, a union, a tuple or a Mapping of such.

    Raises MalformedProfile with the full path of the key; what a dataclass itself refuses is named the same way.
    """
    return cast(T, _decode(kind, value, key))


def _decode(kind: Any, value: object, key: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decode_fields(cast(type, kind), value, key)
    if origin in (types.UnionType, Union):
        return None if value is None else _decode(next(a for a in arguments if a is not types.NoneType), value, key)
    if origin is tuple:
        return _decode_tuple(arguments, value, key)
    if origin is not None and issubclass(origin, Mapping):
        items = _table(value, key).items()
        return {name: _decode(arguments[1], item, f"{key}.{name}") for name, item in items}
    return _decode_scalar(kind, value, key)


def _decode_scalar(kind: Any, value: object, key: str) -> object:
    if kind is float and type(value) is int:
        value = _float(value, key)
    if type(value) is not kind:
        _refuse(key, {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind], value)
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(key, "a finite number", value)
    return value


def _float(value: int, key: str) -> float:
    try:
        return float(value)
    except OverflowError:
        _refuse(key, "a finite number", "one of hundreds of digits")


def _decode_tuple(kinds: tuple[Any, ...], value: object, key: str) -> object:
    if not isinstance(value, list):
        _refuse(key, "a list", value)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        _refuse(key, f"a list of {len(kinds)}", value)
    return tuple(_decode(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _decode_fields(kind: type, value: object, key: str) -> object:
    table, hints, at = _table(value, key), get_type_hints(kind), f"{key}." if key else ""
    for name in table:
        if name not in hints:
            _refuse(f"{at}{name}", f"one of {', '.join(hints)}", "a key nobody knows")
    for field in fields(kind):
        if field.name not in table and field.default is MISSING and field.default_factory is MISSING:
            _refuse(f"{at}{field.name}", _described(hints[field.name]), "nothing")
    values = {name: _decode(hints[name], item, f"{at}{name}") for name, item in table.items()}
    try:
        return kind(**values)
    except MalformedProfile as error:
        raise MalformedProfile(f"{at}{error.key}", error.wanted, error.found) from None


def _described(kind: Any) -> str:
    return "a table" if is_dataclass(kind) else getattr(kind, "__name__", str(kind))


def _table(value: object, key: str) -> dict[str, object]:
    if not isinstance(value, dict):
        _refuse(key, "a table", value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    _refuse("", "finite numbers", name)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        _refuse(next(name for name in names if names.count(name) > 1), "a key once", "it twice")
    return table


def _refuse(key: str, wanted: str, found: object) -> NoReturn:
    raise MalformedProfile(key or _WHOLE, wanted, found)
