"""Where a prompt comes from: the command line, or what is piped in."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pipo.base.errors import UsageError


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


def piped_prompt() -> str:
    """All of stdin, without the newline at its end. Raises UsageError at a terminal: nobody would know to type."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no prompt", hint='pipo run MODEL "a prompt", or `pipo chat MODEL` to talk')
    return _decoded(sys.stdin.buffer.read()).removesuffix("\n")


def piped_lines() -> Iterator[str]:
    """The lines of stdin as they come, without their ends."""
    for line in iter(sys.stdin.buffer.readline, b""):
        yield _decoded(line).rstrip("\r\n")


def check_not_empty(prompt: str, *, is_raw: bool) -> None:
    """Raises UsageError. A raw prompt may be white space."""
    if not (prompt if is_raw else prompt.strip()):
        raise UsageError("the prompt is empty", hint="give some text")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02X}"
        ) from error
