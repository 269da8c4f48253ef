"""Adapters on the command line: what they change, what the plan says of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import CommandLine
from tests.support.random_adapters import write_random_adapter

GREEDY = ("--temp", "0", "-n", "12", "--prefill-chunk", "16")


@pytest.fixture(scope="module")
def style(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "style.gguf"
    return write_random_adapter(smollm2_path, path, strength=0.3)


def test_an_adapter_changes_the_answer_wherever_weights_live(pipo: CommandLine, style: Path) -> None:
    ask = ("run", "smollm2", "Say hello.", *GREEDY)
    plain = pipo(*ask, "-q")
    streamed = pipo(*ask, "--lora", str(style), "--ram", "125MB")
    resident = pipo(*ask, "--lora", str(style), "--ram", "400MB")
    assert (plain.code, streamed.code, resident.code) == (0, 0, 0), streamed.err
    assert "stream from disk in every pass" in streamed.err and "nothing streams" in resident.err
    assert streamed.out == resident.out != plain.out
    assert "adapters   style: rank 8, scale 1, 210 matrices, 9.3 MiB" in streamed.err
    assert pipo(*ask, "-q", "--lora", f"{style}:0").out == plain.out


def test_the_plan_counts_them(pipo: CommandLine, style: Path) -> None:
    ended = pipo("run", "smollm2", "Hi", "-n", "1", "--json", "--lora", str(style), "--lora", f"{style}:-0.25")
    plan = ended.json["plan"]
    assert [(each["id"], each["scale"], each["ranks"]) for each in plan["adapters"]] == [
        ("style", 1.0, [8]), ("style-2", -0.25, [8]),
    ]  # fmt: skip
    assert plan["breakdown_bytes"]["adapters"] > 2 * plan["adapters"][0]["bytes"] > 0
    assert "adapters" not in pipo("run", "smollm2", "Hi", "-n", "1", "--json").json["plan"]["breakdown_bytes"]


def test_every_verb_that_plans_knows_them(pipo: CommandLine, style: Path) -> None:
    row = "adapters   style: rank 8, scale 0.5"
    flags = ("smollm2", "--lora", f"{style}:0.5", "--ram", "200MB")
    assert row in pipo("plan", *flags, "--machine", "rtx3060-laptop", "--device", "cpu").out
    assert row in pipo("show", *flags).out
    chat = pipo("chat", *flags, "--temp", "0", "-n", "4", stdin="Say hello.\n/stats\n")
    assert row in chat.err and "adapters         9.3 MiB" in chat.err


def test_what_is_refused(pipo: CommandLine, style: Path, smollm2_path: Path, tmp_path: Path) -> None:
    for value, code, what in (
        (f"{style}:nan", 2, "scale nan is not a finite number"),
        (str(tmp_path / "none.gguf"), 1, "no such file"),
        (str(smollm2_path), 1, "holds 'model', wanted a LoRA adapter"),
        (str(tmp_path), 1, "adapter_config.json: no such file"),
    ):
        ended = pipo("run", "smollm2", "Hi", "-n", "1", "--lora", value)
        assert (ended.code, ended.out) == (code, "") and what in ended.err and "Traceback" not in ended.err
    assert "hint: an adapter goes with --lora" in pipo("run", str(style), "Hi").err


def test_the_smallest_budget_works(pipo: CommandLine, style: Path) -> None:
    ask = ("run", "smollm2", "Hi", *GREEDY, "--lora", str(style))
    refused = pipo(*ask, "--ram", "60MB")
    assert refused.code == 2 and "adapters 9." in refused.err
    smallest = refused.err.split("the smallest --ram that works is ")[1].split()[0]
    ended = pipo(*ask, "--ram", smallest)
    assert ended.code == 0 and "more than the limit" not in ended.err
