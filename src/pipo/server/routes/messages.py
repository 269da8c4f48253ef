"""Anthropic's messages. Source: Anthropic's API reference, "Messages" and "Streaming Messages"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from secrets import token_hex

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.generation.answer import Piece
from pipo.generation.request import FinishReason, GenerationRequest, Usage
from pipo.server.answer_reader import AnswerDelta, AnswerReader, reading_of
from pipo.server.answers import Answers
from pipo.server.body import body_of
from pipo.server.errors import ApiError, Fault, anthropic_error
from pipo.server.event_stream import Events, named_event, open_stream
from pipo.server.prompts import Encoded
from pipo.server.replies import JsonResponse
from pipo.server.schemas.messages import ConversationBody, CountBody, MessagesBody
from pipo.server.service import Service, service_of

router = APIRouter()
_PING = named_event("ping", {"type": "ping"})


@router.post("/messages")
async def messages(request: Request) -> Response:
    service, reply = service_of(request), await _prepared(request)
    if not reply.is_stream:
        return JsonResponse(await reply.whole())
    return await open_stream(
        reply.events(), ping=_PING, ping_s=service.settings.limits.ping_s, error_event=_error_event
    )


async def _prepared(request: Request) -> _Reply:
    """Everything that can be refused is refused here. Raises ApiError, PipoError."""
    service = service_of(request)
    async with body_of(MessagesBody, request) as body:
        adapters = service.adapters_of(body.model)
        reading = reading_of(service.prompts, body.choice, body.constraint)
        prompt = await _encoded(service, body)
        max_tokens = service.check_lengths(len(prompt.ids), body.max_tokens)
        asked = reading.request(prompt, body.params(max_tokens), adapters)
        return _Reply(service, body, asked, reading.make(prompt.tail))


@router.post("/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    service = service_of(request)
    async with body_of(CountBody, request) as body:
        service.adapters_of(body.model)
        reading_of(service.prompts, body.choice)
        return JsonResponse({"input_tokens": len((await _encoded(service, body)).ids)})


async def _encoded(service: Service, body: ConversationBody) -> Encoded:
    return await service.prompts.encode_chat(
        body.template_messages(),
        service.info.context_tokens,
        tools=body.choice.shown,
        continues=body.continues,
    )


def _error_event(error: ApiError) -> bytes:
    return named_event("error", anthropic_error(error))


def _usage_dict(usage: Usage) -> dict[str, object]:
    """`input_tokens` are those that were not cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class _Change:
    """What a part means for the list of blocks: a block that begins, or more of the one that is open."""

    block: dict[str, object] | None
    delta: dict[str, object]


class _Blocks:
    """Text, thoughts and calls as blocks of an answer's content, one after the other."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, object]] = []
        self._texts: list[str] = []
        self._key = ""

    def take(self, delta: AnswerDelta) -> Iterator[_Change]:
        if delta.reasoning:
            yield self._more("thinking", delta.reasoning)
        if delta.text:
            yield self._more("text", delta.text)
        for call in delta.calls:
            self._close()
            block = {"type": "tool_use", "id": call.id, "name": call.name}
            self.blocks.append(block | {"input": json.loads(call.arguments)})
            yield _Change(block | {"input": {}}, {"type": "input_json_delta", "partial_json": call.arguments})

    def _more(self, key: str, text: str) -> _Change:
        begins = key != self._key
        if begins:
            self._open(key)
        self._texts.append(text)
        return _Change(dict(self.blocks[-1]) if begins else None, {"type": f"{key}_delta", key: text})

    def _open(self, key: str) -> None:
        self._close()
        self._key = key
        signature: dict[str, object] = {"signature": ""} if key == "thinking" else {}
        self.blocks.append({"type": key, key: "", **signature})

    def _close(self) -> None:
        if self._key:
            self.blocks[-1][self._key] = "".join(self._texts)
        self._key, self._texts = "", []

    def whole(self) -> list[dict[str, object]]:
        self._close()
        return self.blocks

    @property
    def has_calls(self) -> bool:
        return any(block["type"] == "tool_use" for block in self.blocks)


class _Reply:
    def __init__(self, service: Service, body: MessagesBody, asked: GenerationRequest, reader: AnswerReader) -> None:
        self.is_stream = body.stream
        self._model = body.model
        self._num_prompt = len(asked.prompt)
        self._answers = Answers(service, [asked])
        self._reader = reader
        self._blocks = _Blocks()
        self._usage = Usage(self._num_prompt, 0)
        self._last: Piece | None = None

    async def whole(self) -> dict[str, object]:
        async for growth in self._answers.grow():
            if not isinstance(growth.item, Piece):
                self._usage = growth.item.usage
                continue
            for delta in self._read(growth.item):
                list(self._blocks.take(delta))
        return self._message(self._blocks.whole(), self._stop_fields())

    async def events(self) -> Events:
        has_begun = False
        async for growth in self._answers.grow():
            if not has_begun:  # not before: a request that is refused is no stream
                has_begun = True
                start = {"type": "message_start", "message": self._message([], _NOT_STOPPED)}
                yield named_event("message_start", start) + _PING
            if not isinstance(growth.item, Piece):
                self._usage = growth.item.usage
                continue
            for delta in self._read(growth.item):
                for change in self._blocks.take(delta):
                    yield self._event_of(change)
        if self._blocks.blocks:
            yield self._stop_event()
        end = {"type": "message_delta", "delta": self._stop_fields(), "usage": _usage_dict(self._usage)}
        yield named_event("message_delta", end)
        yield named_event("message_stop", {"type": "message_stop"})

    def _read(self, piece: Piece) -> list[AnswerDelta]:
        self._last = piece
        return [self._reader.feed(piece.text), *([self._reader.finish()] if piece.finish is not None else [])]

    def _event_of(self, change: _Change) -> bytes:
        """With what ends the block before, and begins one."""
        index, head = len(self._blocks.blocks) - 1, b""
        if change.block is not None:
            head = self._stop_event(index - 1) if index else b""
            start = {"type": "content_block_start", "index": index, "content_block": change.block}
            head += named_event("content_block_start", start)
        delta = {"type": "content_block_delta", "index": index, "delta": change.delta}
        return head + named_event("content_block_delta", delta)

    def _stop_event(self, index: int | None = None) -> bytes:
        index = len(self._blocks.blocks) - 1 if index is None else index
        return named_event("content_block_stop", {"type": "content_block_stop", "index": index})

    def _message(self, content: list[dict[str, object]], stop: dict[str, object]) -> dict[str, object]:
        return {
            "id": f"msg_{token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **stop,
            "usage": _usage_dict(self._usage),
        }

    def _stop_fields(self) -> dict[str, object]:
        if self._last is None or self._last.finish in (None, FinishReason.CANCELLED):
            raise ApiError(Fault.BROKEN, "the engine ended an answer without a reason")
        if self._last.stop is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._last.stop}
        if self._last.finish is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        return {"stop_reason": "tool_use" if self._blocks.has_calls else "end_turn", "stop_sequence": None}


_NOT_STOPPED: dict[str, object] = {"stop_reason": None, "stop_sequence": None}
