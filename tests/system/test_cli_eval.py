"""`pipo eval` as a user runs it: what it prints, at which budgets, what it refuses, how it is stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as GgufType

from tests.support.command_line import CommandLine
from tests.support.tiny_models import TinySpec, make_model, write_gguf

SPEC = TinySpec(hidden_size=128, intermediate_size=256, num_layers=4, context_tokens=512)
WORDS = "the tide rises because of the moon and a good clock tells when\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of one model, a text of some thousand tokens, and one of a few."""
    folder = tmp_path_factory.mktemp("eval")
    model = make_model(SPEC)
    write_gguf(model, folder / "model.gguf", GgufType.F16)
    write_gguf(model, folder / "small.gguf", GgufType.Q4_0)
    (folder / "text.txt").write_text(WORDS * 60)
    (folder / "short.txt").write_text(WORDS)
    return folder


def smallest_of(refused: str) -> str:
    return refused.split("smallest --ram that works is ")[1].split()[0]


def test_words_for_a_person(pipo: CommandLine, folder: Path) -> None:
    ended = pipo("eval", str(folder / "small.gguf"), str(folder / "text.txt"), "--against", str(folder / "model.gguf"))
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    assert [line[0] for line in lines if line][:4] == ["small.gguf", "perplexity", "mean", "scored"]
    for word in ("against model.gguf", "ratio", "difference", "KL", "median", "99.9%", "same top", "±"):
        assert word in ended.out
    assert "scored" in ended.err and ended.err.count("peak") == 2 and "windows" in ended.err


def test_quiet_says_the_figures_alone(pipo: CommandLine, folder: Path) -> None:
    ended = pipo("eval", "-m", str(folder / "model.gguf"), "-f", str(folder / "text.txt"), "-q", "-c", "256")
    assert ended.code == 0 and ended.err == "" and "perplexity" in ended.out


def test_json_at_the_smallest_budget_and_at_a_roomy_one(pipo: CommandLine, folder: Path) -> None:
    asked = ("eval", str(folder / "small.gguf"), str(folder / "text.txt"), "-c", "64", "--max-windows", "5", "--json")
    asked = (*asked, "--against", str(folder / "model.gguf"), "--prefill-chunk", "16", "--layout", "plain")
    roomy = pipo(*asked)
    assert roomy.code == 0, roomy.err
    refused = pipo(*asked, "--ram", "1MB")
    assert refused.code == 2 and "scores" in refused.err and "Traceback" not in refused.err
    tight = pipo(*asked, "--ram", smallest_of(refused.err))
    assert tight.code == 0, tight.err
    for found in (roomy.json, tight.json):
        assert (found["num_windows"], found["num_scored_tokens"], found["window_tokens"]) == (5, 5 * 31, 64)
        for side in (found, found["against"]):
            assert side["cost"]["peak_anonymous_bytes"] <= side["plan"]["limit_bytes"]
            assert side["cost"]["passes"]["num_tokens"] == 5 * 63
    for key in ("perplexity", "mean_nll_nats", "bits_per_byte"):
        assert roomy.json[key] == tight.json[key]
    for key in ("kl_nats", "same_top", "perplexity_ratio", "perplexity_difference"):
        assert roomy.json["against"][key] == tight.json["against"][key]
    kl = roomy.json["against"]["kl_nats"]
    assert 0 < kl["median"] < kl["percentile_99"] <= kl["percentile_99_9"] <= kl["max"]
    assert 0.001 < kl["value"] < 1 and 0 < kl["error"] < kl["value"]


def test_a_real_model_in_a_budget_it_does_not_fit(pipo: CommandLine, tmp_path: Path) -> None:
    """A model against itself: the budget is kept twice in a row, and nothing is left in the folder of the file."""
    (tmp_path / "tide.txt").write_text("The tide rises because the moon pulls the sea. " * 30)
    asked = (
        "eval",
        "smollm2",
        str(tmp_path / "tide.txt"),
        "-c",
        "128",
        "--ram",
        "125MB",
        "--json",
        "--against",
        "smollm2",
    )
    ended = pipo(*asked, "--tmp-dir", str(tmp_path / "kept"))
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["plan"]["streamed_bytes_per_pass"] > 0
    for side in (found, found["against"]):
        assert side["cost"]["peak_anonymous_bytes"] <= 125_000_000
        assert 1 < side["perplexity"]["value"] < 3, "the text repeats itself"
    assert found["against"]["kl_nats"]["max"] < 1e-7 and found["against"]["same_top"]["value"] == 1.0
    assert "warning" not in ended.err
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_is_refused(pipo: CommandLine, folder: Path, tmp_path: Path) -> None:
    model, text, short = (str(folder / name) for name in ("model.gguf", "text.txt", "short.txt"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 5000)
    (tmp_path / "file").write_text("")
    write_gguf(make_model(TinySpec(vocab_size=400)), tmp_path / "other.gguf")
    for arguments, says in (
        ((model, short), "wanted 1024 tokens, two windows of 512, at least, found"),
        ((model, short, "--max-windows", "1"), "wanted 1024 tokens"),
        ((model, str(tmp_path / "empty.txt")), "is empty"),
        ((model, str(tmp_path / "latin.txt")), "is not UTF-8 text: byte 3 is 0xE9"),
        ((model, str(tmp_path / "absent.txt")), "cannot be read"),
        ((model, str(tmp_path)), "cannot be read"),
        ((model, text, "-c", "513"), "windows of 513 tokens exceed the 512"),
        ((model, text, "-c", "7"), "a window has 8 tokens at least"),
        ((model, text, "--against", str(tmp_path / "other.gguf")), "has a vocabulary of 400 tokens"),
        ((model, text, "--against", model, "--tmp-dir", str(tmp_path / "file" / "x")), "cannot be written to"),
        ((model, text, "--tmp-dir", str(tmp_path)), "--tmp-dir needs --against"),
        ((model, text, "more"), "one word too many: 'more'"),
        ((model,), "which text?"),
        ((), "which model?"),
        ((model, text, "--max-windows", "0"), "--max-windows"),
        ((model, text, "--ram", "1MB"), "the smallest --ram that works is"),
        ((model, text, "--vram", "1GB"), "--vram"),
    ):
        ended = pipo("eval", *arguments)
        assert ended.code == 2, (arguments, ended.err)
        assert says in " ".join(ended.err.split()) and "Traceback" not in ended.err, (arguments, ended.err)
        assert ended.out == ""
    absent = pipo("eval", model, text, "--against", str(tmp_path / "absent.gguf"))
    assert absent.code == 1 and "absent.gguf" in absent.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_says_what_was_found(
    pipo: CommandLine, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "long.txt").write_text("The tide rises because the moon pulls the sea. " * 3000)
    process = pipo.start("eval", "smollm2", str(tmp_path / "long.txt"), "-c", "64", "--ram", "400MB", "--json")
    assert process.stderr
    while b"evaluating" not in (line := process.stderr.readline()):
        assert line, "progress is shown"
    begin = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 3.0
    assert process.returncode == code
    assert b"stopped after" in err and b"perplexity" in err and b"Traceback" not in err
    assert out == b""


def test_a_bar_with_the_perplexity_so_far_on_a_terminal(pipo: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("The tide rises because the moon pulls the sea. " * 400)
    terminal = pipo.on_terminal("eval", "smollm2", str(tmp_path / "long.txt"), "-c", "64", "--ram", "400MB")
    terminal.expect("left · perplexity")
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert "stopped after" in terminal.plain
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")
