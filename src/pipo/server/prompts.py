"""Requests' texts to token ids and back, on a thread beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pipo.base.errors import ContextOverflow, UsageError
from pipo.model_file import ModelFile
from pipo.server.errors import invalid
from pipo.text.answer_formats import answer_format_of
from pipo.text.chat_template import ChatTemplate, Message
from pipo.text.contract import ModelTokenizer
from pipo.text.conversation import template_messages

T = TypeVar("T")
_TAIL_CHARS = 200  # more than any marker has
_NUM_THREADS = 1  # the plan has memory for one text to be encoded at a time


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, and the last words of its text."""

    ids: list[int]
    tail: str


class Prompts:
    """A model's tokenizer and chat template, as the server uses them. `template` is None where the model has none.

    Threads: methods that are awaited, the event loop's.
    """

    def __init__(self, tokenizer: ModelTokenizer, template: ChatTemplate | None, template_text: str = "") -> None:
        self.tokenizer = tokenizer
        self.template_text = template_text
        self.answer_format = answer_format_of(template_text or None)
        self._template = template
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "text")

    @classmethod
    def of_model(cls, model: ModelFile) -> Prompts:
        """Raises MalformedFile where the template is none."""
        source = model.template_source
        return cls(model.tokenizer, None) if source is None else cls(model.tokenizer, model.chat_template, source)

    @property
    def template(self) -> ChatTemplate:
        """Raises ApiError where the model has none."""
        if self._template is None:
            raise invalid("the model has no chat template: /v1/completions takes plain text")
        return self._template

    async def encode(self, text: str, context_tokens: int) -> list[int]:
        """Plain text, with the model's begin token; texts of special tokens are read as such, as llama.cpp does."""
        return await self._run(lambda: self._encode(text, context_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Message],
        context_tokens: int,
        *,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
        continues: bool = False,
    ) -> Encoded:
        """A conversation in the model's template. With `continues` the answer goes on where the last message ends.

        Raises ApiError, UsageError and MalformedFile with the template's words, ContextOverflow.
        """
        template = self.template

        def encode() -> Encoded:
            made = template_messages(messages, self.answer_format.tools.id_chars)
            rendered = template.render(made, not continues, tools=tools, variables=variables)
            if continues:
                rendered = _up_to(rendered, messages[-1])
            self._refuse_longer(rendered, context_tokens)
            return Encoded(self.tokenizer.encode_chat(rendered), rendered[-_TAIL_CHARS:])

        return await self._run(encode)

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool, max_tokens: int) -> list[int]:
        def encode() -> list[int]:
            self._refuse_longer(text, max_tokens)
            return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

        return await self._run(encode)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Control tokens give no text. Raises UsageError for an id that the vocabulary lacks."""
        self.check_ids(token_ids)
        return await self._run(lambda: self.tokenizer.decode(token_ids))

    def check_ids(self, token_ids: Sequence[int]) -> None:
        outside = next((each for each in token_ids if not 0 <= each < self.tokenizer.vocab_size), None)
        if outside is not None:
            raise UsageError(f"there is no token {outside}, the vocabulary has {self.tokenizer.vocab_size} tokens")

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        """What a token stands for, as text with U+FFFD for what is half a character, and as bytes."""
        data = self.tokenizer.token_bytes(token_id)
        return data.decode(errors="replace"), list(data)

    def special_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.tokenizer.token_text(token_id)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, context_tokens: int) -> list[int]:
        self._refuse_longer(text, context_tokens)
        return self.tokenizer.encode(text, add_special=True, parse_special=True)

    def _refuse_longer(self, text: str, context_tokens: int) -> None:
        if self.tokenizer.is_longer(text, context_tokens, parse_special=True):
            raise ContextOverflow(
                f"a prompt of {len(text)} characters does not fit the context of {context_tokens} tokens"
            )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _up_to(rendered: str, message: Message) -> str:
    """Without what a template puts after the message's words. Raises ApiError where they cannot be found."""
    words = str(message["content"]).rstrip()
    end = rendered.rfind(words) if words else -1
    if end < 0:
        raise invalid("the chat template does not let an answer that was begun go on", "messages")
    return rendered[: end + len(words)]
