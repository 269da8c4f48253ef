"""`/v1/completions`, `/v1/embeddings`, `/tokenize` and `/detokenize` as clients write them.

Source: OpenAI's API reference, and llama.cpp's `tools/server/README.md`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipo.server.body import Body
from pipo.server.schemas.sampling import MAX_COUNT, MAX_LOGPROBS, Positive, SamplingBody

TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(SamplingBody):
    prompt: Prompt
    max_tokens: Positive | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None


class EmbeddingsBody(Body):
    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class TokenizeBody(Body):
    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    tokens: list[TokenId]


def prompts_in(prompt: Prompt) -> list[str | list[int]]:
    """One or several, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    found: list[str | list[int]] = []
    ids: list[int] = []
    for each in prompt:
        if isinstance(each, int):
            ids.append(each)
        else:
            found.append(each)
    return [ids] if ids else found
