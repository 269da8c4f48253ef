"""What a server or a job asks of an engine that runs in another process, and what it hears back.

Everything here can be pickled. Text, templates and token ids are the asking side's; the engine's side computes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipo.base.errors import PipoError
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, Summary

__all__ = ["EngineClient", "EngineInfo", "EngineStats", "ServedEngine", "Summary"]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine runs. `plan` is what `pipo plan --json` says."""

    model: str
    context_tokens: int
    num_sequences: int
    limit_bytes: int
    adapters: tuple[str, ...] = ()
    plan: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started, and what is so at this moment. Bytes and seconds."""

    num_waiting: int = 0
    num_running: int = 0
    num_unread: int = 0  # tokens of prompts that are being read, and are still to come
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts
    completion_tokens: int = 0
    num_passes: int = 0
    bytes_read: int = 0  # weights, from the drive
    compute_s: float = 0.0
    wall_s: float = 0.0  # of all passes
    stall_s: Mapping[str, float] = field(default_factory=dict)  # by cause
    ledger: Mapping[str, int] = field(default_factory=dict)  # who holds how much of the budget
    limit_bytes: int = 0
    anonymous_bytes: int = 0  # of all processes that count against the budget
    peak_bytes: int = 0


class EngineClient(Protocol):
    """An engine as seen from an event loop."""

    @property
    def info(self) -> EngineInfo: ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[Piece | Summary]:
        """Pieces as they are made, then the summary. Closing the iterator cancels the request, within a stage.

        Raises UsageError, ContextOverflow and OverBudget before any work; EngineBusy where the queue is full;
        TransferError, ComputeError, Cancelled.
        """

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """The last token's normed hidden state (hidden size), of length 1. Raises as `stream`."""

    async def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


class ServedEngine(EngineClient, Protocol):
    """One that a server lives and ends with."""

    async def ended(self) -> PipoError:
        """Waits until it has ended: why."""

    async def kill(self) -> None:
        """End it without waiting for what it does, also where `close` waits already."""
