"""`/v1/completions`, `/v1/embeddings`, `/tokenize` and `/detokenize` as clients write them.

Source: OpenAI's API reference, and llama.cpp's `tools/server/README.md`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipo.server.body import Body
from pipo.server.errors import invalid
from pipo.server.schemas.formats import AnyFormat
from pipo.server.schemas.sampling import MAX_COUNT, MAX_LOGPROBS, SamplingBody

TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(SamplingBody):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: AnyFormat | None = None

    @property
    def num_tokens(self) -> int:
        """Of each answer. Raises ApiError where there would be nothing at all."""
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens is 0, which needs echo", "max_tokens")
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None


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
