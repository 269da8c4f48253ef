"""Many prompts, each with its answer as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipo.base.errors import PipoError, UsageError
from pipo.generation.adapters import AdapterSet
from pipo.generation.answer import Piece, completion_of
from pipo.generation.events import Event
from pipo.generation.request import Completion, GenerationRequest, SamplingParams, Summary


def requests_of(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None,
    adapters: Sequence[AdapterSet] | None,
) -> list[GenerationRequest]:
    """One per prompt; of `adapters` there are as many. Raises UsageError where there are not as many parameters."""
    settings = [params or SamplingParams()] * len(prompts) if isinstance(params, SamplingParams | None) else params
    choices = [None] * len(prompts) if adapters is None else [_plain(each) for each in adapters]
    if len(settings) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts with {len(settings)} parameters")
    details = zip(prompts, settings, choices, strict=True)
    return [GenerationRequest(prompt, each, choice) for prompt, each, choice in details]


def completions(requests: Sequence[GenerationRequest], events: Iterator[Event]) -> list[Completion]:
    """Of requests that are numbered in their order. Raises the first error that ends one."""
    pieces: list[list[Piece]] = [[] for _ in requests]
    found: dict[int, Completion] = {}
    for i, what in events:
        if isinstance(what, PipoError):
            raise what
        if isinstance(what, Piece):
            pieces[i].append(what)
        elif isinstance(what, Summary):
            found[i] = completion_of(requests[i].prompt, pieces[i], what.usage.cached_tokens)
            pieces[i].clear()
    return [found[i] for i in range(len(requests))]


def _plain(choice: AdapterSet) -> str | Mapping[str, float] | None:
    """As a request says it."""
    return {str(name): scale for name, scale in choice.items()} if isinstance(choice, Mapping) else choice
