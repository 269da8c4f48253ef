"""What can be answered at all: tokens that the model has, a prompt and an answer that fit its context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipo.base.errors import ContextOverflow, UsageError
from pipo.generation.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one model in one plan."""

    vocab_size: int
    context_tokens: int  # prompt and answer together

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Tokens the answer may have. Raises UsageError, ContextOverflow: nothing is ever cut."""
        self.check_prompt(prompt)
        self.check_vocabulary(params.logit_bias)
        room = self.context_tokens - len(prompt)
        wanted = params.max_tokens
        if room < (wanted or 1):
            answer = f"{wanted} tokens of answer" if wanted else "any answer"
            raise ContextOverflow(
                f"a prompt of {len(prompt)} tokens and {answer} do not fit the context of {self.context_tokens}",
                hint=f"-c {len(prompt) + (wanted or 256)} or a shorter prompt",
            )
        return wanted or room

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Of which no answer is wanted. Raises UsageError, ContextOverflow."""
        if not len(prompt):
            raise UsageError("the prompt is empty", hint="give some text")
        self.check_vocabulary(prompt)
        if len(prompt) > self.context_tokens:
            raise ContextOverflow(
                f"a prompt of {len(prompt)} tokens does not fit the context of {self.context_tokens}",
                hint=f"-c {len(prompt)} or a shorter prompt",
            )

    def check_vocabulary(self, token_ids: Iterable[int]) -> None:
        """Raises UsageError."""
        outside = next((t for t in token_ids if not 0 <= t < self.vocab_size), None)
        if outside is not None:
            raise UsageError(f"token id {outside} is outside the vocabulary of {self.vocab_size}")
