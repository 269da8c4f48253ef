"""Where a prompt comes from: the command line, or what is piped in."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pipo.base.errors import ContextOverflow, UsageError
from pipo.base.units import format_size


def sort_words(words: list[str], model_flag: str | None, prompt_flag: str | None) -> tuple[str, str | None]:
    """The model and, where the command line has one, the prompt. Each may stand as a word or as a flag.

    Raises UsageError.
    """
    left = list(words)
    model = model_flag if model_flag is not None else left.pop(0) if left else None
    if model is None:
        raise UsageError("which model?", hint='pipo run MODEL "a prompt"; `pipo list` shows the models there are')
    prompt = prompt_flag if prompt_flag is not None else left.pop(0) if left else None
    if left:
        raise UsageError(f"one word too many: {left[0]!r}", hint="put a prompt of several words in quotes")
    return model, prompt


def check_stdin() -> None:
    """Raises UsageError where the shell closed it."""
    if sys.stdin is None:
        raise UsageError("standard input is closed", hint="chat reads the messages there: a terminal, or a pipe")


def only_model(word: str | None, flag: str | None) -> str:
    """The model of a verb that takes nothing else. Raises UsageError."""
    model = flag if flag is not None else word
    if model is None:
        raise UsageError("which model?", hint="`pipo list` shows the models there are")
    if word is not None and flag is not None:
        raise UsageError(f"one word too many: {word!r}", hint="the model stands as a word or as -m")
    return model


def check_is_piped() -> None:
    """Raises UsageError at a terminal: nobody would know to type."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no prompt", hint='pipo run MODEL "a prompt", or `pipo chat MODEL` to talk')


def piped_prompt(max_bytes: int) -> str:
    """All of stdin, without the newline at its end. Raises ContextOverflow after reading `max_bytes`."""
    data = sys.stdin.buffer.read(max_bytes + 1)
    _check_size(data, max_bytes)
    return _decoded(data).removesuffix("\n")


def piped_lines(max_bytes: int) -> Iterator[str]:
    """The lines of stdin as they come, without their ends. Raises ContextOverflow for one over `max_bytes`."""
    while data := sys.stdin.buffer.readline(max_bytes + 1):
        _check_size(data, max_bytes)
        yield _decoded(data).rstrip("\r\n")


def check_not_empty(prompt: str, *, is_raw: bool) -> None:
    """Raises UsageError. A raw prompt may be white space."""
    if not (prompt if is_raw else prompt.strip()):
        raise UsageError("the prompt is empty", hint="give some text")


def _check_size(data: bytes, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise ContextOverflow(
            f"standard input has more text than the context can hold: over {format_size(max_bytes)}",
            hint="a shorter prompt, or -c N for a larger context if one was set",
        )


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02X}"
        ) from error
