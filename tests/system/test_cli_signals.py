"""Ctrl-C and SIGTERM end a run soon, whatever it is doing, and leave the terminal as it was."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from tests.support.command_line import CommandLine

LONG_PROMPT = "word " * 6000  # seconds of prefill
SOON_S = 3.0  # a second is promised; the rest is for busy machines
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def _read_until(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stderr
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"{word!r} never came")


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> float:
    """Seconds the process takes to end after the signal."""
    begin = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    return time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_prefill(pipo: CommandLine, number: signal.Signals) -> None:
    process = pipo.start("run", "smollm2", LONG_PROMPT, "-n", "4", "--ram", "400MB")
    _read_until(process, b"expect")
    time.sleep(0.5)
    assert process.poll() is None
    assert _end(process, number) < SOON_S
    assert process.returncode == CODES[number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ram", ["125MB", "400MB"])
def test_a_signal_ends_an_answer(pipo: CommandLine, number: signal.Signals, ram: str) -> None:
    process = pipo.start("run", "smollm2", "story", "--ignore-eos", "-n", "400", "--ram", ram)
    assert process.stdout
    assert process.stdout.read(5)
    assert _end(process, number) < SOON_S
    assert process.returncode == CODES[number]


def test_a_signal_before_the_model_is_open_shows_no_traceback(pipo: CommandLine) -> None:
    for delay_s in (0.05, 0.1, 0.2, 0.3):
        process = pipo.start("run", "smollm2", "hi", "-n", "4000", "--ignore-eos")
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT)
        if process.returncode == 130:
            assert b"Traceback" not in err


def test_ctrl_c_on_a_terminal_removes_the_bar_and_shows_the_cursor(pipo: CommandLine) -> None:
    terminal = pipo.on_terminal("run", "smollm2", LONG_PROMPT, "-n", "4", "--ram", "400MB")
    terminal.expect("/6")  # of the bar's count
    begin = time.monotonic()
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert time.monotonic() - begin < SOON_S
    assert "Traceback" not in terminal.plain
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")
