"""What one sequence contributes to a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a sequence at positions start, start + 1, …; `wants_logits` of the last one."""

    sequence: int
    start: int
    token_ids: Sequence[int]
    wants_logits: bool
