"""A request's body: read within bounds of size and time, then checked against a model, field by field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipo.base.units import format_size
from pipo.server.errors import ApiError, Fault, invalid
from pipo.server.service import service_of

_MAX_WORDS = 300  # of what is quoted in an error
_DRAINED = 4  # times the largest body: read on and dropped, as a connection closed before takes the refusal with it
_BRANCHES = {"str", "int", "float", "bool", "dict", "list", "none", "json-invalid"}  # of a union, no fields
_TAGGED = {"response_format", "tool_choice"}  # fields whose values are told apart by their type
_TAGS = {"system", "developer", "user", "assistant", "tool", "text", "tool_use", "tool_result", "thinking"}


class Body(BaseModel):
    """What a client sends: no field that is not known, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


B = TypeVar("B", bound=Body)


class BodyRoom:
    """Bytes of bodies that are in memory at once."""

    def __init__(self) -> None:
        self.num_bytes = 0

    @contextmanager
    def account(self) -> Iterator[_Share]:
        share = _Share(self)
        try:
            yield share
        finally:
            self.num_bytes -= share.num_bytes


class _Share:
    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.num_bytes = 0

    def take(self, num_bytes: int, limit_bytes: int) -> None:
        """Raises ApiError where all bodies together would be more."""
        if self._room.num_bytes + num_bytes > limit_bytes:
            raise ApiError(Fault.UNAVAILABLE, "too much is being read at the moment", code="busy")
        self._room.num_bytes += num_bytes
        self.num_bytes += num_bytes


@asynccontextmanager
async def body_of(kind: type[B], request: Request) -> AsyncIterator[B]:
    """The body as a `kind`, for a block that makes token ids of it. One block runs at a time: a body takes many times
    its size until then, and must not be kept after it. Raises ApiError.
    """
    service = service_of(request)
    with service.body_room.account() as share:
        data = await _read(request, share)
        async with service.text_turn:
            body = parse(kind, data)
            data.clear()
            yield body


def parse(kind: type[B], data: bytes | bytearray) -> B:
    """Raises ApiError naming the field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits
        raise invalid(f"the body cannot be read: {error!s:.{_MAX_WORDS}}") from None


async def _read(request: Request, share: _Share) -> bytearray:
    service = service_of(request)
    most, seconds = service.max_body_bytes, service.settings.limits.read_timeout_s
    data, num_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes <= most:
                    share.take(len(chunk), service.most_bodies_bytes)
                    data += chunk
                elif num_bytes > _DRAINED * most:
                    break
    except TimeoutError:
        raise ApiError(Fault.TOO_SLOW, f"the body did not arrive within {seconds:g} s") from None
    if num_bytes > most:
        raise ApiError(Fault.TOO_LARGE, f"the body is larger than {format_size(most)}, the most that is read")
    return data


def _refusal(error: ValidationError) -> ApiError:
    """The error of the deepest field: where a value may be of several types, the others say less."""
    details = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
    where = ".".join(_field_path(details)) or None
    kind, words = details["type"], details["msg"]
    if kind == "json_invalid":
        return invalid(f"the body is not valid JSON: {words.removeprefix('Invalid JSON: '):.{_MAX_WORDS}}")
    if kind == "extra_forbidden":
        return invalid(f"the field {where!r:.80} is not supported", where, "unsupported_field")
    if kind == "missing":
        return invalid(f"the field {where!r:.80} is missing", where, "missing_field")
    words = words.removeprefix("Value error, ")
    return invalid(f"{where or 'the body'}: {words:.{_MAX_WORDS}}", where, "invalid_value")


def _field_path(details: ErrorDetails) -> list[str]:
    """Without the names of the branches of a union."""
    *path, last = details["loc"] or ("",)
    fields = []
    for i, each in enumerate(path):
        before = path[i - 1] if i > 0 else ""
        is_tag = before in _TAGGED or (each in _TAGS and isinstance(before, int))
        if isinstance(each, int) or not (is_tag or _is_branch(each)):
            fields.append(str(each))
    is_field = isinstance(last, int) or details["type"] == "extra_forbidden" or not _is_branch(last)
    return [*fields, str(last)] if is_field and last != "" else fields


def _is_branch(name: str) -> bool:
    return name in _BRANCHES or "[" in name or "-" in name or name[:1].isupper()
