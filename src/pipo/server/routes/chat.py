"""OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.generation.answer import Piece
from pipo.generation.request import FinishReason, GenerationRequest, Sampled, copies_of
from pipo.server.answer_reader import AnswerDelta, AnswerReader, ToolCall, reading_of
from pipo.server.answers import Answers, UsageSum, finish_text, openai_head, openai_usage
from pipo.server.body import body_of
from pipo.server.errors import invalid, openai_error
from pipo.server.event_stream import OPENAI_DONE, OPENAI_PING, Events, data_event, open_stream
from pipo.server.logprobs import chat_logprobs, check_kept
from pipo.server.replies import JsonResponse
from pipo.server.schemas.chat import ChatBody
from pipo.server.service import Service, service_of

router = APIRouter()


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    return await openai_response(service_of(request), await _prepared(request))


class OpenAiReply(Protocol):
    """Answers to one request, whole or as they are made."""

    @property
    def is_stream(self) -> bool: ...

    async def whole(self) -> dict[str, object]: ...

    def events(self) -> Events: ...


async def openai_response(service: Service, reply: OpenAiReply) -> Response:
    if not reply.is_stream:
        return JsonResponse(await reply.whole())
    return await open_stream(
        reply.events(),
        ping=OPENAI_PING,
        ping_s=service.settings.limits.ping_s,
        error_event=lambda error: data_event(openai_error(error)),
    )


async def _prepared(request: Request) -> _Reply:
    """Everything that can be refused is refused here. Raises ApiError, PipoError."""
    service = service_of(request)
    async with body_of(ChatBody, request) as body:
        info, choice, limits = service.info, body.choice, service.settings.limits
        adapters, reading = service.adapters_of(body.model), reading_of(service.prompts, choice, body.constraint)
        check_choices(service, body.num_answers)
        prompt = await service.prompts.encode_chat(
            body.template_messages(), info.context_tokens, tools=choice.shown, variables=body.variables
        )
        max_tokens = service.check_lengths(len(prompt.ids), body.answer_tokens)
        if not body.stream:
            check_kept(body.num_answers, max_tokens, body.num_logprobs, limits.max_logprob_bytes)
        params = body.params(max_tokens, body.num_logprobs)
        service.prompts.check_ids(list(params.logit_bias))
        body.check_stream_options()
        readers = [reading.make(prompt.tail) for _ in range(body.num_answers)]
        requests = copies_of(reading.request(prompt, params, adapters), body.num_answers)
        return _Reply(service, body, requests, readers)


def check_choices(service: Service, num_choices: int) -> None:
    most = service.settings.limits.max_choices
    if num_choices > most:
        raise invalid(f"{num_choices} answers are more than the {most} that one request may ask for", "n")


@dataclass(slots=True)
class _Choice:
    """One answer as it was read so far."""

    reader: AnswerReader
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Sampled] = field(default_factory=list)
    finish: FinishReason | None = None

    def read(self, piece: Piece) -> Iterator[AnswerDelta]:
        """What a piece adds, if anything; the last piece may add twice."""
        deltas = [self.reader.feed(piece.text)]
        if piece.finish is not None:
            self.finish = piece.finish
            deltas.append(self.reader.finish())
        return (delta for delta in deltas if delta.text or delta.reasoning or delta.calls)


class _Reply:
    """One request and its answers, as they are told. Keeps nothing of the body's texts."""

    def __init__(
        self, service: Service, body: ChatBody, requests: Sequence[GenerationRequest], readers: Sequence[AnswerReader]
    ) -> None:
        self.is_stream = body.stream
        self._service = service
        self._has_logprobs, self._has_usage = bool(body.logprobs), body.includes_usage
        self._answers = Answers(service, requests)
        self._choices = [_Choice(reader) for reader in readers]
        self._usage = UsageSum(len(requests))
        self._head = openai_head(service, body.model, "chatcmpl", "chat.completion")

    async def whole(self) -> dict[str, object]:
        async for growth in self._answers.grow():
            choice = self._choices[growth.index]
            if not isinstance(growth.item, Piece):
                self._usage.take(growth.index, growth.item)
                continue
            for delta in choice.read(growth.item):
                choice.texts.append(delta.text)
                choice.thoughts.append(delta.reasoning)
                choice.calls += delta.calls
            if self._has_logprobs and growth.item.token is not None:
                choice.tokens.append(growth.item.token)
        choices = [self._choice_dict(index, choice) for index, choice in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": openai_usage(self._usage.total)}

    def _choice_dict(self, index: int, choice: _Choice) -> dict[str, object]:
        text, thoughts = "".join(choice.texts), "".join(choice.thoughts)
        message: dict[str, object] = {"role": "assistant", "content": text if text or not choice.calls else None}
        message["refusal"] = None
        if thoughts:
            message["reasoning_content"] = thoughts
        if choice.calls:
            message["tool_calls"] = [_call_dict(call) for call in choice.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._service.prompts, choice.tokens) if self._has_logprobs else None,
            "finish_reason": finish_text(choice.finish, bool(choice.calls)),
        }

    async def events(self) -> Events:
        self._head["object"] = "chat.completion.chunk"
        extra: dict[str, object] = {"usage": None} if self._has_usage else {}
        begun: set[int] = set()
        async for growth in self._answers.grow():
            if not isinstance(growth.item, Piece):
                self._usage.take(growth.index, growth.item)
                continue
            if growth.index not in begun:
                begun.add(growth.index)
                yield self._chunk(growth.index, {"role": "assistant", "content": ""}, extra)
            for event in self._events_of(growth.index, growth.item, extra):
                yield event
        if self._has_usage:
            yield data_event(self._head | {"choices": [], "usage": openai_usage(self._usage.total)})
        yield OPENAI_DONE

    def _events_of(self, index: int, piece: Piece, extra: dict[str, object]) -> list[bytes]:
        choice, events = self._choices[index], []
        logprobs = None
        if self._has_logprobs and piece.token is not None:
            logprobs = chat_logprobs(self._service.prompts, [piece.token])
        for delta in choice.read(piece):
            events.append(self._chunk(index, _delta_dict(choice, delta), extra, logprobs))
            logprobs = None
        if logprobs is not None:  # of a token whose text is held back
            events.append(self._chunk(index, {}, extra, logprobs))
        if choice.finish is not None:
            finish = finish_text(choice.finish, bool(choice.calls))
            events.append(self._chunk(index, {}, extra, finish=finish))
        return events

    def _chunk(
        self,
        index: int,
        delta: dict[str, object],
        extra: dict[str, object],
        logprobs: dict[str, object] | None = None,
        finish: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return data_event(self._head | {"choices": [choice]} | extra)


def _delta_dict(choice: _Choice, delta: AnswerDelta) -> dict[str, object]:
    """Calls are counted over the whole answer."""
    found: dict[str, object] = {}
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.text:
        found["content"] = delta.text
    if delta.calls:
        first = len(choice.calls)
        found["tool_calls"] = [{"index": first + i, **_call_dict(call)} for i, call in enumerate(delta.calls)]
        choice.calls += delta.calls
    return found


def _call_dict(call: ToolCall) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
