"""`pipo run` as a user runs it: prompts from everywhere, answers as text and JSON, files that are no models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine, Ended

GREEDY = ("--temp", "0", "-n", "12")


def _run(pipo: CommandLine, *arguments: str, stdin: str = "") -> Ended:
    ended = pipo("run", "smollm2", *arguments, stdin=stdin)
    assert ended.code == 0, ended.err
    return ended


def test_every_way_to_give_a_prompt_is_the_same_prompt(pipo: CommandLine, smollm2_path: Path) -> None:
    answer = _run(pipo, "Say hello.", *GREEDY).out
    assert answer.strip() and answer.endswith("\n")
    assert _run(pipo, "-p", "Say hello.", *GREEDY).out == answer
    assert _run(pipo, *GREEDY, stdin="Say hello.\n").out == answer
    assert pipo("run", "-m", str(smollm2_path), "Say hello.", *GREEDY).out == answer
    assert pipo("run", "--model", "SmolLM2", "--prompt", "Say hello.", *GREEDY).out == answer


def test_streamed_and_resident_answers_are_the_same(pipo: CommandLine) -> None:
    same = ("Count to five.", *GREEDY, "--prefill-chunk", "16")
    streamed, resident = _run(pipo, *same, "--ram", "125MB"), _run(pipo, *same, "--ram", "400MB")
    assert streamed.out == resident.out
    assert "stream from disk in every pass" in streamed.err
    assert "nothing streams" in resident.err


def test_raw_and_system_change_what_the_model_reads(pipo: CommandLine) -> None:
    def prompt_tokens(*arguments: str) -> int:
        return int(_run(pipo, "Once upon a time", "-n", "1", "--json", *arguments).json["usage"]["prompt_tokens"])

    assert prompt_tokens("--raw") == 4
    assert prompt_tokens() > 20
    assert prompt_tokens("--system", "Be brief.") < prompt_tokens()


def test_plan_before_and_cost_after_go_to_stderr(pipo: CommandLine) -> None:
    ended = _run(pipo, "Say hello.", *GREEDY, "--ram", "125MB", "--ignore-eos")
    for word in ("weights", "memory", "context", "prefill", "expect", "KV cache", "tokens a pass", "tokens/s"):
        assert word in ended.err
    status = ended.err.splitlines()[-1]
    for word in ("tok/s", "predicted", "first token", "GB/s", "of the drive", "stalled", "peak", "cut at 12 tokens"):
        assert word in status
    assert "\x1b" not in ended.err


def test_quiet_says_nothing_and_verbose_everything(pipo: CommandLine) -> None:
    assert _run(pipo, "Say hello.", *GREEDY, "--quiet").err == ""
    verbose = _run(pipo, "Say hello.", *GREEDY, "--verbose", "--ram", "125MB").err
    assert "resident weights" in verbose and "computing" in verbose and "disk" in verbose


def test_json_is_one_object_with_plan_and_cost(pipo: CommandLine) -> None:
    text = _run(pipo, "Say hello.", *GREEDY, "--ignore-eos").out
    found = _run(pipo, "Say hello.", *GREEDY, "--ignore-eos", "--json", "--ram", "125MB").json
    assert found["text"] == text.removesuffix("\n")
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 12
    assert "tokens" not in found
    plan, cost = found["plan"], found["cost"]
    assert plan["context_tokens"] == found["usage"]["prompt_tokens"] + 12
    assert cost["bytes_per_token"] == plan["streamed_bytes_per_pass"] > 0
    assert cost["decode"]["num_passes"] == 11
    assert set(cost["decode"]["stall_s"]) == {"queue", "disk", "repack", "copy"}
    assert 0 < cost["peak_anonymous_bytes"] <= plan["limit_bytes"]


def test_logprobs_name_the_likeliest(pipo: CommandLine) -> None:
    tokens = _run(pipo, "Say hello.", *GREEDY, "--json", "--logprobs", "3").json["tokens"]
    for token in tokens:
        assert len(token["top"]) == 3
        assert token["top"][0]["id"] == token["id"], "greedy takes the likeliest"
        assert token["logprob"] == token["top"][0]["logprob"] < 0


def test_the_same_seed_gives_the_same_answer_and_stop_ends_it(pipo: CommandLine) -> None:
    first, second = (_run(pipo, "Tell a tale.", "-n", "24", "--seed", "7").out for _ in range(2))
    assert first == second
    found = _run(pipo, "Count.", "--temp", "0", "-n", "40", "--json", "--stop", "e", "--stop", "a").json
    assert found["finish_reason"] == "stop"
    assert "e" not in found["text"] and "a" not in found["text"]


def test_an_explicit_context_is_kept_and_bounds_an_answer_nobody_measured(pipo: CommandLine) -> None:
    found = _run(pipo, "Write a story.", "-c", "60", "--ignore-eos", "--json").json
    assert found["plan"]["context_tokens"] == 60
    assert found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("hi", "-c", "10"), "do not fit the context of 10"),
        (("hi", "-c", "64", "-n", "60"), "do not fit the context of 64"),
        (("word " * 9000,), "do not fit the model's context of 8192"),
        (("hi", "-n", "9000"), "do not fit the model's context of 8192"),
        (("hi", "-c", "10000"), "exceeds the 8192"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(pipo: CommandLine, arguments: tuple[str, ...], says: str) -> None:
    ended = pipo("run", "smollm2", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err and "hint:" in ended.err


def test_trace_loads_and_has_a_row_per_worker(pipo: CommandLine, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    _run(pipo, "hi", "-n", "4", "--ram", "125MB", "--trace", str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "read 0", "read 1"} <= rows
    assert sum(event["ph"] == "X" for event in events) > 100


@pytest.mark.parametrize("schedule", ["pipelined", "sequential", "layer"])
def test_schedules_agree(pipo: CommandLine, schedule: str) -> None:
    plain = _run(pipo, "Say hello.", *GREEDY, "--ram", "125MB").out
    assert _run(pipo, "Say hello.", *GREEDY, "--ram", "125MB", "--schedule", schedule).out == plain


def test_stdin_that_is_not_text_is_refused(pipo: CommandLine) -> None:
    ended = pipo("run", "smollm2", stdin=b"abc\xff\n")
    assert ended.code == 2
    assert ended.err == "error: standard input is not UTF-8 text: byte 3 is 0xFF\n"


def test_a_terminal_without_prompt_is_told_what_to_do(pipo: CommandLine) -> None:
    terminal = pipo.on_terminal("run", "smollm2")
    assert terminal.wait() == 2
    assert "there is no prompt" in terminal.plain and "pipo chat" in terminal.plain


def test_files_that_are_no_models_are_named(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello\n")
    (tmp_path / "empty.gguf").touch()
    with smollm2_path.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(20_000_000))
        (tmp_path / "header.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    cases = {
        "text.gguf": "is not a GGUF file",
        "empty.gguf": "is empty",
        "cut.gguf": "the file ends at",
        "header.gguf": "error: ",
        "missing.gguf": "no such file",
        "": "is a folder",
    }
    for name, says in cases.items():
        path = str(tmp_path / name) if name else str(tmp_path)
        for verb in (("run", path, "hi"), ("show", path)):
            ended = pipo(*verb)
            assert (ended.code, ended.out) == (1, ""), verb
            assert says in ended.err and path in ended.err
            assert "Traceback" not in ended.err and "a bug" not in ended.err
    assert pipo("run", "nosuchmodel", "hi").code == 1


def test_a_model_without_template_is_pointed_to_raw(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(smollm2_path.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_tempiate", 1))
    ended = pipo("run", str(bare), "hi")
    assert (ended.code, ended.out) == (2, "")
    assert "no chat template" in ended.err and "--raw" in ended.err
    assert pipo("chat", str(bare)).code == 2
    assert pipo("run", str(bare), "Once upon", "--raw", "-n", "3").code == 0
    assert "no template" in pipo("show", str(bare)).out


def test_a_bar_counts_the_prompt_on_a_terminal(pipo: CommandLine) -> None:
    terminal = pipo.on_terminal("run", "smollm2", "word " * 600, "-n", "2", "--prefill-chunk", "64")
    assert terminal.wait() == 0
    assert "prefill" in terminal.plain and "tokens 0:00" in terminal.plain
    assert terminal.shown.count("\x1b[?25l") == terminal.shown.count("\x1b[?25h"), "the cursor is shown again"


def test_a_terminal_gets_no_control_characters_of_the_model() -> None:
    import pipo.cli.terminal as terminal

    assert terminal._CONTROLS.sub("", "a\x1b[2Jb\r\x07\n\tc\x9b") == "a[2Jb\n\tc"


def test_what_cut_an_answer_is_named(pipo: CommandLine) -> None:
    full = pipo("run", "smollm2", "hi", "--raw", "-c", "20", "--ignore-eos")
    assert "the context of 20 is full" in full.err and "by -n" not in full.err
    assert "cut at 5 tokens by -n" in pipo("run", "smollm2", "hi", "--raw", "-n", "5", "--ignore-eos").err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--vram", "1GB", "--device", "cpu"), "contradict"),
        (("--vram", "1GB"), "no device besides the CPU"),
    ],
)
def test_memory_of_a_device_that_is_not_there(pipo: CommandLine, arguments: tuple[str, ...], what: str) -> None:
    ended = pipo("run", "smollm2", "hi", *arguments)
    assert ended.code == 2 and what in ended.err and not ended.out


def test_what_cannot_fit_is_refused_before_the_machine_is_measured(
    pipo: CommandLine, smollm2_path: Path, tmp_path: Path
) -> None:
    fresh = replace(pipo, environment=pipo.environment | {"XDG_CACHE_HOME": str(tmp_path)})
    ended = fresh("run", str(smollm2_path), "hi", "--ram", "140MB", "-c", "8000")
    assert ended.code == 2 and "the smallest --ram" in ended.err
    assert not (tmp_path / "pipo" / "machine.json").exists()
