"""Messages of OpenAI's API as chat templates expect them, which is as Hugging Face `transformers` passes them."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from pipo.base.errors import UsageError
from pipo.text.chat_template import Message

_ID_LETTERS = string.digits + string.ascii_lowercase


def template_messages(messages: Sequence[Message], id_chars: int | None = None) -> list[dict[str, Any]]:
    """The same with text as one string, arguments of calls as objects, and tools' results that say whose they are.

    `id_chars` is what a family's templates want of ids of calls (`ToolFormat`): others are renamed, the same in call
    and result. Raises UsageError naming the message.
    """
    names: dict[str, str] = {}
    return [_template_message(i, message, names, id_chars) for i, message in enumerate(messages)]


def _template_message(idx: int, message: Message, names: dict[str, str], id_chars: int | None) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f"messages[{idx}] must be an object with a role, not {message!r:.80}")
    made: dict[str, Any] = {**message, "content": _text(idx, message.get("content"))}
    calls = message.get("tool_calls")
    if calls is None:
        made.pop("tool_calls", None)
    else:
        made["tool_calls"] = _calls(idx, calls, names, id_chars)
    call_id = message.get("tool_call_id")
    if isinstance(call_id, str):
        if call_id in names:
            made.setdefault("name", names[call_id])
        made["tool_call_id"] = _fitting(call_id, id_chars)
    return made


def _text(idx: int, content: object) -> str:
    """Nothing where there is none: templates join it to other text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"messages[{idx}].content must be a string or a list of parts, not {content!r:.80}")
    return "".join(_part(f"messages[{idx}].content[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise UsageError(
            f"{where} is of type {kind!r:.40}, only text can be read", hint='{"type": "text", "text": "…"}'
        )
    return text


def _calls(idx: int, calls: object, names: dict[str, str], id_chars: int | None) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise UsageError(f"messages[{idx}].tool_calls must be a list, not {calls!r:.80}")
    return [_call(f"messages[{idx}].tool_calls[{i}]", call, names, id_chars) for i, call in enumerate(calls)]


def _call(where: str, call: object, names: dict[str, str], id_chars: int | None) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise UsageError(f"{where} is no call of a function with a name")
    made = {"type": "function", **call, "function": {**function, "arguments": _arguments(where, function)}}
    if isinstance(call.get("id"), str):
        names[call["id"]] = name
        made["id"] = _fitting(call["id"], id_chars)
    return made


def _arguments(where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}.function.arguments is no JSON: {error!s:.200}") from None
    if not isinstance(arguments, dict):
        raise UsageError(f"{where}.function.arguments must be an object, not {arguments!r:.80}")
    return arguments


def _fitting(call_id: str, id_chars: int | None) -> str:
    """Itself where it fits, else letters made of it: the same for the same."""
    if id_chars is None or (len(call_id) == id_chars and call_id.isascii() and call_id.isalnum()):
        return call_id
    digest = hashlib.sha256(call_id.encode(errors="replace")).digest()
    return "".join(_ID_LETTERS[byte % len(_ID_LETTERS)] for byte in digest[:id_chars])
