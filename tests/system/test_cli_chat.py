"""`pipo chat`, line by line through a pipe and key by key on a terminal."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from tests.support.command_line import BINARY, CommandLine

SHORT = ("--temp", "0", "-n", "16")
PROMPT = ">>> "


def _cached_tokens(err: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+) were in the KV cache", err)]


def test_each_line_is_answered_and_earlier_turns_stay_in_the_cache(pipo: CommandLine) -> None:
    ended = pipo("chat", "smollm2", *SHORT, stdin="My name is Ada.\n\nWhat is my name?\n/stats\n")
    assert ended.code == 0
    assert len(ended.out.strip().splitlines()) >= 2
    assert _cached_tokens(ended.err)[-1] > 30
    assert "KV cache in f16" in ended.err and "context" in ended.err


def test_a_chat_answers_as_run_does(pipo: CommandLine) -> None:
    answer = pipo("run", "smollm2", "Say hello.", *SHORT).out
    assert pipo("chat", "smollm2", *SHORT, "--quiet", stdin="Say hello.\n").out == answer
    brief = pipo("run", "smollm2", "Say hello.", "--system", "Be brief.", *SHORT).out
    assert pipo("chat", "smollm2", *SHORT, "--system", "Be brief.", stdin="Say hello.\n").out == brief
    assert pipo("chat", "smollm2", *SHORT, stdin="/system Be brief.\nSay hello.\n").out == brief
    assert pipo("chat", "smollm2", *SHORT, stdin="Sing.\n/clear\nSay hello.\n").out.endswith(answer)


def test_commands(pipo: CommandLine) -> None:
    ended = pipo("chat", "smollm2", *SHORT, stdin="/help\n/system\n/nope\n/stats\n/exit\nnever answered\n")
    assert ended.code == 0
    assert ended.out == ""
    for word in ("/clear", "Ctrl-D", "there is no system prompt", "there is no command /nope", "resident weights"):
        assert word in ended.err


def test_a_full_context_is_said_and_never_cut(pipo: CommandLine) -> None:
    lines = "Write a long story.\nGo on.\n/clear\nSay hello.\n"
    ended = pipo("chat", "smollm2", "--temp", "0", "--ignore-eos", "-c", "80", stdin=lines)
    assert ended.code == 0
    assert "the context is full, the answer may be cut: /clear begins anew" in ended.err
    refused = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(refused) == 1, "the second turn does not fit, the third begins anew"
    assert "the context 80: there is no room for an answer" in refused[0]
    assert ended.err.count("80 of 80 tokens") == 2


def test_answers_are_cut_where_asked_and_that_is_said(pipo: CommandLine) -> None:
    ended = pipo("chat", "smollm2", "-n", "4", "--ignore-eos", stdin="Count.\n")
    assert "cut at 4 tokens by -n" in ended.err


def test_a_context_too_large_for_the_budget_is_refused(pipo: CommandLine) -> None:
    ended = pipo("chat", "smollm2", "-c", "8192", "--ram", "150MB", stdin="hi\n")
    assert (ended.code, ended.out) == (2, "")
    assert "smallest --ram" in ended.err


def test_ctrl_c_stops_the_answer_and_keeps_the_session(pipo: CommandLine) -> None:
    terminal = pipo.on_terminal("chat", "smollm2", "--ignore-eos", "--temp", "0", "--ram", "250MB")
    terminal.expect(PROMPT)
    terminal.type("Tell me a very long story.\n")
    terminal.expect(" the ")
    terminal.type("\x03")
    assert "stopped" in terminal.expect(PROMPT)
    terminal.type("/stats\n")
    assert "decode" in terminal.expect(PROMPT)
    terminal.type("Another one.\n")
    terminal.expect(" the ")
    terminal.type("\x03")
    terminal.expect(PROMPT)
    time.sleep(0.3)  # a signal between readline's prompt and its wait goes unseen until the next key
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert "Traceback" not in terminal.plain


@pytest.mark.parametrize("ending", ["\x04", "/exit\n"])
def test_a_chat_ends_as_its_user_wants(pipo: CommandLine, ending: str) -> None:
    terminal = pipo.on_terminal("chat", "smollm2", *SHORT, "--ram", "250MB")
    terminal.expect(PROMPT)
    terminal.type("Say hello.\n")
    assert "tok/s" in terminal.expect(PROMPT)
    terminal.type(ending)
    assert terminal.wait() == 0


def test_a_closed_standard_input_is_refused_before_the_model_is_opened(pipo: CommandLine) -> None:
    command = ["sh", "-c", 'exec "$0" chat no-such-model <&-', str(BINARY)]
    done = subprocess.run(command, env=pipo.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: standard input is closed\n")
