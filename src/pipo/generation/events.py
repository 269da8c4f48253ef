"""What is asked of those who answer requests, and what they say of each. Everything here can be pickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from pipo.base.errors import PipoError
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, Summary

RequestId = NewType("RequestId", int)


@dataclass(frozen=True, slots=True)
class Submit:
    """A request that is to be answered."""

    request_id: RequestId
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Embed:
    """The last token's normed hidden state is wanted."""

    request_id: RequestId
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants the rest of it. One that has ended does not mind."""

    request_id: RequestId


Command = Submit | Embed | Cancel


@dataclass(frozen=True, slots=True)
class Embedding:
    """Of a prompt, (hidden size) numbers, of length 1."""

    vector: list[float]


# a summary, an embedding or an error is the last thing that is said of a request
Event = tuple[RequestId, Piece | Summary | Embedding | PipoError]
