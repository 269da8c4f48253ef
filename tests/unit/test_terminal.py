"""What a model file says reaches the terminal as words: no cursor moved, no line forged, not without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from pipo.base.errors import UnsupportedModel, UsageError
from pipo.cli import terminal
from pipo.cli.terminal import MAX_CHARS, on_one_line, print_columns, print_error, print_rows, printable
from pipo.formats.checkpoint import open_checkpoint
from pipo.models.registry import stages_of
from pipo.text.chat_template import MAX_QUOTED_CHARS, ChatTemplate
from tests.support.gguf_bytes import GgufBytes, llama_keys, text_key, write

HOSTILE = "a\x1b[2J\r\x9b\u202eb\n\nhint: c"
RAW = ("\x1b", "\r", "\x9b", "\u202e")


def test_errors_and_hints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "stderr", lambda: Console(stderr=True, soft_wrap=True, highlight=False))
    print_error(HOSTILE, HOSTILE)
    print_error("x" * (1 << 21))
    shown = capsys.readouterr().err
    assert "a[2Jb" in shown and not any(each in shown for each in RAW)
    assert len(shown) < 2 * MAX_CHARS


def test_rows_and_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    print_rows(console, HOSTILE, [(HOSTILE, HOSTILE)])
    print_columns(console, ("part",), [(HOSTILE,)])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 4 and not any(each in shown for each in RAW)


@pytest.mark.parametrize("num_chars", [MAX_CHARS, MAX_CHARS + 1, 2 * MAX_CHARS + 1])
def test_the_length_is_capped(num_chars: int) -> None:
    shown = printable("x" * num_chars)
    assert shown == "x" * num_chars if num_chars <= MAX_CHARS else shown == "x" * MAX_CHARS + " …"
    assert on_one_line("\x1b" * num_chars).strip(" …") == ""


def test_a_message_keeps_its_lines() -> None:
    assert printable("needs 5 GiB\n  weights 2 GiB") == "needs 5 GiB\n  weights 2 GiB"


@pytest.mark.parametrize("value", [HOSTILE, "v" * (1 << 20)])
def test_a_key_that_is_not_run_is_quoted(tmp_path: Path, value: str) -> None:
    keys = [*llama_keys(), text_key(f"llama.{HOSTILE}", value)]
    with pytest.raises(UnsupportedModel, match=r"key .* asks for something") as caught:
        stages_of(open_checkpoint(write(tmp_path, bytes(GgufBytes(keys)))).manifest)
    assert caught.value.message.isprintable() and len(caught.value.message) < 300


def test_the_words_of_a_template_stay_on_their_line() -> None:
    source = "{{ raise_exception('no\\n\\nhint: run this' ~ 'x' * 5000) }}"
    with pytest.raises(UsageError, match="refuses the messages: no hint: run this") as caught:
        ChatTemplate(source, None, None).render([])
    assert "\n" not in caught.value.message and len(caught.value.message) < MAX_QUOTED_CHARS + 100
