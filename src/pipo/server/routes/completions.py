"""OpenAI's completions: plain text, goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.generation.answer import Piece
from pipo.generation.request import FinishReason, GenerationRequest, Sampled, copies_of
from pipo.server.answers import Answers, UsageSum, finish_text, openai_head, openai_usage
from pipo.server.body import body_of
from pipo.server.errors import invalid
from pipo.server.event_stream import OPENAI_DONE, Events, data_event
from pipo.server.logprobs import check_kept, completion_logprobs
from pipo.server.routes.chat import check_choices, openai_response
from pipo.server.schemas.completions import DEFAULT_TOKENS, CompletionBody, prompts_in
from pipo.server.service import Service, service_of

router = APIRouter()


@router.post("/completions")
async def completions(request: Request) -> Response:
    return await openai_response(service_of(request), await _prepared(request))


async def _prepared(request: Request) -> _Reply:
    """Everything that can be refused is refused here. Raises ApiError, PipoError."""
    service = service_of(request)
    async with body_of(CompletionBody, request) as body:
        prompts = prompts_in(body.prompt)
        check_choices(service, body.num_answers * len(prompts))
        if body.echo and body.logprobs is not None:
            raise invalid("log-probabilities of a prompt are not supported: echo without logprobs", "logprobs")
        body.check_stream_options()
        requests: list[GenerationRequest] = []
        echoes: list[str] = []
        for prompt in prompts:
            ids, text = await _encoded(service, prompt, needs_text=bool(body.echo))
            requests += copies_of(_request(service, body, ids), body.num_answers)
            echoes += [text if body.echo else ""] * body.num_answers
        if not body.stream:
            limits = service.settings.limits
            check_kept(len(requests), _num_tokens(body), body.logprobs, limits.max_logprob_bytes)
        return _Reply(service, body, requests, echoes)


def _num_tokens(body: CompletionBody) -> int:
    return DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens


def _request(service: Service, body: CompletionBody, ids: list[int]) -> GenerationRequest:
    params = body.params(service.check_lengths(len(ids), _num_tokens(body)), body.logprobs)
    service.prompts.check_ids(list(params.logit_bias))
    return GenerationRequest(ids, params, service.adapters_of(body.model))


async def _encoded(service: Service, prompt: str | list[int], *, needs_text: bool) -> tuple[list[int], str]:
    """Token ids and, where it is needed, text."""
    if isinstance(prompt, str):
        ids = await service.prompts.encode(prompt, service.info.context_tokens)
        if not ids:
            raise invalid("the prompt is empty", "prompt")
        return ids, prompt
    service.prompts.check_ids(prompt)
    return prompt, await service.prompts.decode(prompt) if needs_text else ""


@dataclass(slots=True)
class _Choice:
    echo: str
    texts: list[str] = field(default_factory=list)
    tokens: list[Sampled] = field(default_factory=list)
    finish: FinishReason | None = None
    offset: int = 0  # of the next token's text; counted only for log-probabilities


class _Reply:
    """One request and its answers, as they are told."""

    def __init__(
        self, service: Service, body: CompletionBody, requests: Sequence[GenerationRequest], echoes: Sequence[str]
    ) -> None:
        self.is_stream = body.stream
        self._service = service
        self._has_logprobs, self._has_usage = body.logprobs is not None, body.includes_usage
        self._answers = Answers(service, requests)
        self._choices = [_Choice(echo, offset=len(echo)) for echo in echoes]
        self._usage = UsageSum(body.num_answers)
        self._head = openai_head(service, body.model, "cmpl", "text_completion")

    async def whole(self) -> dict[str, object]:
        async for growth in self._answers.grow():
            choice, piece = self._choices[growth.index], growth.item
            if not isinstance(piece, Piece):
                self._usage.take(growth.index, piece)
                continue
            choice.texts.append(piece.text)
            choice.finish = piece.finish
            if self._has_logprobs and piece.token is not None:
                choice.tokens.append(piece.token)
        choices = [self._choice_dict(index, choice) for index, choice in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": openai_usage(self._usage.total)}

    def _choice_dict(self, index: int, choice: _Choice) -> dict[str, object]:
        finish = finish_text(choice.finish)
        return self._part(index, choice, choice.echo + "".join(choice.texts), choice.tokens, finish)

    def _part(
        self, index: int, choice: _Choice, text: str, tokens: Sequence[Sampled], finish: str | None
    ) -> dict[str, object]:
        logprobs = None
        if self._has_logprobs:
            logprobs = completion_logprobs(self._service.prompts, tokens, choice.offset)
            choice.offset += sum(len(self._service.prompts.token_text(token.token_id)[0]) for token in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    async def events(self) -> Events:
        extra: dict[str, object] = {"usage": None} if self._has_usage else {}
        async for growth in self._answers.grow():
            choice, piece = self._choices[growth.index], growth.item
            if not isinstance(piece, Piece):
                self._usage.take(growth.index, piece)
                continue
            text, choice.echo = choice.echo + piece.text, ""
            finish = finish_text(piece.finish) if piece.finish is not None else None
            tokens = [piece.token] if piece.token is not None else []
            if text or finish is not None or self._has_logprobs:
                part = self._part(growth.index, choice, text, tokens, finish)
                yield data_event(self._head | {"choices": [part]} | extra)
        if self._has_usage:
            yield data_event(self._head | {"choices": [], "usage": openai_usage(self._usage.total)})
        yield OPENAI_DONE
