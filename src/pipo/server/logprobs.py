"""Log-probabilities in the shapes of OpenAI's two routes."""

from __future__ import annotations

from collections.abc import Sequence

from pipo.generation.request import Sampled, logprobs_bytes
from pipo.server.errors import invalid
from pipo.server.prompts import Prompts


def chat_logprobs(prompts: Prompts, tokens: Sequence[Sampled]) -> dict[str, object]:
    def entry(token_id: int, logprob: float | None) -> dict[str, object]:
        text, data = prompts.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": data}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(each, logprob) for each, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of one answer as it grows; `scored` tokens of a prompt come before those of the answer, which begin at `offset`,
    in characters of the text.
    """

    def __init__(self, prompts: Prompts, offset: int = 0) -> None:
        self._prompts = prompts
        self._offset = offset
        self._scored_offset = 0
        self._echo = prompts.tokenizer.detokenizer([])

    def part(self, scored: Sequence[Sampled], tokens: Sequence[Sampled]) -> dict[str, object]:
        """The next ones. What the first of a prompt comes after is nothing: it has no log-probability."""
        every = [*scored, *tokens]
        return {
            "tokens": [self._text(token.token_id) for token in every],
            "token_logprobs": [token.logprob for token in every],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in every],
            "text_offset": [*map(self._scored_place, scored), *map(self._place, tokens)],
        }

    def _text(self, token_id: int) -> str:
        return self._prompts.token_text(token_id)[0]

    def _top(self, token: Sampled) -> dict[str, float]:
        return {self._text(each): logprob for each, logprob in token.top}

    def _place(self, token: Sampled) -> int:
        place = self._offset
        self._offset += len(self._text(token.token_id))
        return place

    def _scored_place(self, token: Sampled) -> int:
        """In the text as it is shown: without control tokens and the space that some tokenizers put before a text."""
        place = self._scored_offset
        self._scored_offset += len(self._echo.push(token.token_id))
        return place


def check_kept(num_answers: int, max_tokens: int, num_alternatives: int | None, limit_bytes: int) -> None:
    """What is kept until answers are whole. Raises ApiError where that is too much."""
    if num_alternatives is None:
        return
    needed = num_answers * logprobs_bytes(max_tokens, num_alternatives)
    if needed > limit_bytes:
        raise invalid(
            f"log-probabilities of {num_answers} times {max_tokens} tokens are too many to keep: stream them, or set "
            "a smaller max_tokens",
            "logprobs",
        )
