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


def completion_logprobs(prompts: Prompts, tokens: Sequence[Sampled], offset: int) -> dict[str, object]:
    """`offset` is of the first token, in characters of the text."""
    texts = [prompts.token_text(token.token_id)[0] for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{prompts.token_text(each)[0]: logprob for each, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }


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
