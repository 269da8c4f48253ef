"""OpenAI's completions: plain text, goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipo.generation.answer import Piece
from pipo.generation.request import FinishReason, GenerationRequest, Sampled, copies_of
from pipo.server.answers import Answers, Growth, UsageSum, finish_text, openai_head, openai_usage
from pipo.server.body import body_of
from pipo.server.errors import invalid
from pipo.server.event_stream import OPENAI_DONE, Events, data_event
from pipo.server.logprobs import CompletionLogprobs, check_kept
from pipo.server.routes.chat import check_choices, openai_response
from pipo.server.schemas.completions import CompletionBody, prompts_in
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
        body.check_stream_options()
        requests: list[GenerationRequest] = []
        echoes: list[str] = []
        for prompt in prompts:
            ids, text = await _encoded(service, prompt, needs_text=bool(body.echo))
            requests += copies_of(_request(service, body, ids), body.num_answers)
            echoes += [text if body.echo else ""] * body.num_answers
        if not body.stream:
            limits = service.settings.limits
            num_scored = max(len(each.prompt) for each in requests) if body.scores_prompt else 0
            check_kept(len(requests), body.num_tokens + num_scored, body.logprobs, limits.max_logprob_bytes)
        return _Reply(service, body, requests, echoes)


def _request(service: Service, body: CompletionBody, ids: list[int]) -> GenerationRequest:
    """Where no answer is wanted, one token is asked for all the same: it costs nothing."""
    params = body.params(service.check_lengths(len(ids), body.num_tokens or 1), body.logprobs)
    if body.scores_prompt and body.num_tokens <= 1:
        params = replace(params, ignore_eos=True)  # who scores prompts cuts the answer's token off: it must be there
    service.prompts.check_ids(list(params.logit_bias))
    constraint = None if body.response_format is None else body.response_format.constraint
    adapters = service.adapters_of(body.model)
    return GenerationRequest(ids, params, adapters, constraint, scores_prompt=body.scores_prompt)


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
    scored: list[Sampled] = field(default_factory=list)
    finish: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None  # where they are wanted


class _Reply:
    """One request and its answers, as they are told."""

    def __init__(
        self, service: Service, body: CompletionBody, requests: Sequence[GenerationRequest], echoes: Sequence[str]
    ) -> None:
        self.is_stream = body.stream
        self._has_usage, self._has_answer = body.includes_usage, body.num_tokens > 0
        self._answers = Answers(service, requests)
        has_logprobs = body.logprobs is not None
        self._choices = [
            _Choice(echo, logprobs=CompletionLogprobs(service.prompts, len(echo)) if has_logprobs else None)
            for echo in echoes
        ]
        self._usage = UsageSum(body.num_answers)
        self._head = openai_head(service, body.model, "cmpl", "text_completion")

    async def whole(self) -> dict[str, object]:
        async for growth in self._answers.grow():
            choice, piece = self._choices[growth.index], self._asked_for(growth)
            if piece is None:
                continue
            choice.texts.append(piece.text)
            choice.finish = piece.finish
            if choice.logprobs is not None:
                choice.scored += piece.scored
                choice.tokens += [piece.token] if piece.token is not None else []
        choices = [self._choice_dict(index, choice) for index, choice in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": openai_usage(self._usage.total)}

    def _choice_dict(self, index: int, choice: _Choice) -> dict[str, object]:
        logprobs = choice.logprobs.part(choice.scored, choice.tokens) if choice.logprobs is not None else None
        text = choice.echo + "".join(choice.texts)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_text(choice.finish)}

    def _asked_for(self, growth: Growth) -> Piece | None:
        """Takes the summary, and what is left of a piece where no answer is wanted."""
        item = growth.item
        if self._has_answer:
            if isinstance(item, Piece):
                return item
            self._usage.take(growth.index, item)
            return None
        if isinstance(item, Piece):
            return replace(item, token=None, text="", finish=item.finish and FinishReason.LENGTH)
        self._usage.take(growth.index, replace(item, usage=replace(item.usage, completion_tokens=0)))
        return None

    async def events(self) -> Events:
        extra: dict[str, object] = {"usage": None} if self._has_usage else {}
        async for growth in self._answers.grow():
            choice, piece = self._choices[growth.index], self._asked_for(growth)
            if piece is None:
                continue
            text, choice.echo = choice.echo + piece.text, ""
            finish = finish_text(piece.finish) if piece.finish is not None else None
            tokens = [piece.token] if piece.token is not None else []
            logprobs = choice.logprobs.part(piece.scored, tokens) if choice.logprobs is not None else None
            if text or finish is not None or logprobs is not None:
                part = {"index": growth.index, "text": text, "logprobs": logprobs, "finish_reason": finish}
                yield data_event(self._head | {"choices": [part]} | extra)
        if self._has_usage:
            yield data_event(self._head | {"choices": [], "usage": openai_usage(self._usage.total)})
        yield OPENAI_DONE
