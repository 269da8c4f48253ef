"""From a row to a request: text, token ids, the room its answer has. What cannot be asked becomes a failed answer."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipo.base.errors import ContextOverflow, PipoError, UsageError
from pipo.base.units import MIB
from pipo.generation.request import GenerationRequest
from pipo.jobs.answers import Answer
from pipo.jobs.bounds import MAX_ROW_BYTES, MAX_ROW_S, row_bounds
from pipo.jobs.prompts import Asked, PromptSource
from pipo.jobs.table import Row
from pipo.model_file import ModelFile
from pipo.text.chat_template import Message

DEFAULT_ANSWER_TOKENS = 256  # where nobody asked for a length, or what is left where that is less
MAX_TOO_MUCH = 3  # rows for which a template takes too much, until it ends the job: each costs seconds


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row that is ready to be answered. Rows of one `key` get one answer; None: this row's is drawn by itself."""

    row: int
    request: GenerationRequest
    key: bytes | None = None


class Preparer:
    """Threads: one. `context_tokens` is what prompt and answer have together; None: what the model was made for."""

    def __init__(self, model: ModelFile, source: PromptSource, context_tokens: int | None) -> None:
        trained = model.manifest.hyper.context_tokens
        self._model = model
        self._source = source
        self._num_too_much = 0
        self._context_tokens = min(context_tokens or trained, trained)
        if source.needs_chat_template:
            _ = model.chat_template  # raises where there is none: no row could be asked

    def prepare(self, idx: int, row: Row) -> Prepared | Answer:
        """Never raises what is the row's own fault. Raises UsageError for a template that always takes too much."""
        try:
            if isinstance(row, UsageError):
                raise row
            with row_bounds():
                asked = self._source.ask(row)
            return self._prepared(idx, asked)
        except PipoError as error:
            return Answer.failed(idx, error)
        except (MemoryError, TimeoutError) as error:
            failed = Answer.failed(idx, self._too_much(error))
        gc.collect()  # Jinja's errors are in cycles with all that the template had made
        return failed

    def _too_much(self, error: MemoryError | TimeoutError) -> UsageError:
        self._num_too_much += 1
        bound = f"{MAX_ROW_S:g} s of computing" if isinstance(error, TimeoutError) else f"{MAX_ROW_BYTES // MIB} MiB"
        found = UsageError(f"the prompt template takes more than {bound} for a row")
        if self._num_too_much == MAX_TOO_MUCH:
            raise UsageError(f"{found.message}, and this is row number {MAX_TOO_MUCH} of that kind") from error
        return found

    def _prepared(self, idx: int, asked: Asked) -> Prepared | Answer:
        ids = self._encode(asked.prompt)
        wanted = asked.params.max_tokens if asked.has_limit else None
        room = self._context_tokens - len(ids)
        if room < (wanted or 1):
            return Answer.failed(idx, _overflow(len(ids), wanted, self._context_tokens), len(ids))
        params = replace(asked.params, max_tokens=wanted or min(DEFAULT_ANSWER_TOKENS, room))
        request = GenerationRequest(tuple(ids), params, constraint=asked.constraint)
        return Prepared(idx, request, key_of(request))

    def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
        texts = [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]
        _check(texts, is_raw=isinstance(prompt, str))
        if isinstance(prompt, str):
            return self._model.encode(prompt, self._context_tokens)
        return self._model.encode_chat(prompt, self._context_tokens)


def _check(texts: Sequence[str], *, is_raw: bool) -> None:
    """Raises UsageError for a prompt that is empty, and for half a surrogate pair: JSON can say one, UTF-8 cannot."""
    if not any(text if is_raw else text.strip() for text in texts):
        raise UsageError("the prompt is empty")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt has half a surrogate pair, which is no character") from error


def _overflow(num_prompt: int, wanted: int | None, context_tokens: int) -> ContextOverflow:
    answer = f"{wanted} tokens of answer" if wanted else "any answer"
    return ContextOverflow(f"a prompt of {num_prompt} tokens and {answer} do not fit the context of {context_tokens}")


def key_of(request: GenerationRequest) -> bytes | None:
    """Equal for requests that have one answer: those that draw no random numbers, or draw them from one seed."""
    params = request.params
    if not params.is_greedy and params.seed is None:
        return None
    settings = repr((params, request.constraint, request.adapters)).encode("utf-8", "backslashreplace")
    ids = ",".join(map(str, request.prompt)).encode()
    return hashlib.blake2b(settings + b"\0" + ids, digest_size=16).digest()
