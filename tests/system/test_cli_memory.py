"""`--ram` on the command line: refused before anything happens, or kept by the whole process, libraries included."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine
from tests.support.outside_memory import peak_bytes

CONTEXT = ("-c", "300")
PROMPT = "Tell me a long story about a ship. " * 8


def _smallest(pipo: CommandLine) -> str:
    """The smallest --ram for CONTEXT, as `pipo show` names it."""
    return str(pipo("show", "smollm2", "--ram", "1GB", *CONTEXT, "--json").json["plan"]["smallest_ram"])


def test_what_is_too_small_is_refused_at_once_and_the_number_named_works(pipo: CommandLine) -> None:
    smallest = _smallest(pipo)
    refused = pipo("run", "smollm2", "hi", *CONTEXT, "--ram", "30MB")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: needs ")
    assert f"the smallest --ram that works is {smallest}" in refused.err
    assert all(part in refused.err for part in ("KV cache", "process", "activations"))

    kept = pipo("run", "smollm2", "hi", *CONTEXT, "-n", "4", "--ram", smallest)
    assert kept.code == 0, kept.err
    less = f"{float(smallest.removesuffix('MiB')) * 0.98:.2f}MiB"
    too_little = pipo("run", "smollm2", "hi", *CONTEXT, "-n", "4", "--ram", less)
    assert too_little.code == 2
    assert smallest in too_little.err


@pytest.mark.parametrize("ram", ["smallest", "125MB", "160MB", "auto"])
def test_the_process_stays_under_its_budget(pipo: CommandLine, ram: str) -> None:
    given = _smallest(pipo) if ram == "smallest" else ram
    limit = pipo("show", "smollm2", *CONTEXT, "--ram", given, "--json").json["plan"]["limit_bytes"]
    process = pipo.start("run", "smollm2", PROMPT, *CONTEXT, "-n", "32", "--ignore-eos", "--ram", given)
    peak = peak_bytes(process)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.strip()
    assert 0 < peak <= limit


@pytest.mark.parametrize("megabytes", [0.5, 20.0])
def test_a_piped_prompt_that_cannot_fit_is_refused_before_it_takes_memory(
    pipo: CommandLine, tmp_path: Path, megabytes: float
) -> None:
    text = tmp_path / "prompt.txt"
    text.write_bytes(b"hey " * int(megabytes * 250_000))
    with text.open("rb") as stdin:
        process = pipo.start("run", "smollm2", "--raw", "--ram", "110MB", stdin=stdin)
        peak = peak_bytes(process)
    assert process.returncode == 2
    assert process.stderr and b"context" in process.stderr.read()
    assert peak <= 80_000_000


def test_a_line_of_chat_that_cannot_fit_is_refused(pipo: CommandLine) -> None:
    ended = pipo("chat", "smollm2", "--ram", "150MB", "-c", "300", stdin="hey " * 50_000)
    assert ended.code == 2
    assert "more text than the context can hold" in ended.err


def test_log_probabilities_stay_in_the_budget(pipo: CommandLine, tmp_path: Path) -> None:
    json = ("-c", "620", "-n", "512", "--ignore-eos", "--json", "--logprobs")
    with (tmp_path / "answer.json").open("wb") as stdout:
        process = pipo.start("run", "smollm2", "A ship.", "--ram", "100MB", *json, "20", stdout=stdout)
        peak = peak_bytes(process)
    assert process.returncode == 0
    plan = jsonlib.loads((tmp_path / "answer.json").read_text())["plan"]
    assert plan["breakdown_bytes"]["log-probabilities"] >= 512 * 21 * 128
    assert peak <= 100_000_000
    too_many = pipo("run", "smollm2", "A ship.", *json, "21")
    assert (too_many.code, too_many.out) == (2, "")
    assert "--logprobs 21 is more than 20" in too_many.err


def test_a_trace_stays_in_the_budget(pipo: CommandLine, tmp_path: Path) -> None:
    json = tmp_path / "answer.json"
    command = ("run", "smollm2", "A ship.", "--ram", "100MB", "-n", "300", "--ignore-eos", "--json")
    with json.open("wb") as stdout:
        process = pipo.start(*command, "--trace", str(tmp_path / "trace.json"), stdout=stdout)
        peak = peak_bytes(process)
    assert process.returncode == 0
    assert process.stderr and b"older zones were dropped" in process.stderr.read()
    breakdown = jsonlib.loads(json.read_text())["plan"]["breakdown_bytes"]
    assert 0 < breakdown["trace"] <= 100_000_000 // 16
    assert peak <= 100_000_000
    assert len(jsonlib.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 1000


def test_the_smallest_budget_for_a_trace_works(pipo: CommandLine, tmp_path: Path) -> None:
    command = ("run", "smollm2", "A ship.", *CONTEXT, "-n", "1", "--trace", str(tmp_path / "trace.json"), "--ram")
    refused = pipo(*command, "62MiB")
    smallest = refused.err.split("the smallest --ram that works is ")[1].split()[0]
    assert pipo(*command, smallest).code == 0


def test_a_context_nobody_asked_for_shrinks_until_the_rest_fits(pipo: CommandLine) -> None:
    refused = pipo("chat", "smollm2", "--ram", "62MiB")
    assert refused.code == 2
    smallest = refused.err.split("the smallest --ram that works is ")[1].split()[0]
    least = pipo("show", "smollm2", "--ram", smallest, "--json").json["plan"]
    assert least["context_tokens"] == 256
    assert least["smallest_ram"] == smallest
    limits = [float(smallest.removesuffix("MiB")) + more for more in (0.5, 2, 4, 8, 16, 32)]
    plans = [pipo("show", "smollm2", "--ram", f"{limit:.1f}MiB", "--json").json["plan"] for limit in limits]
    contexts = [plan["context_tokens"] for plan in plans]
    assert contexts == sorted(contexts)


def test_a_plan_has_memory_to_encode_its_context(pipo: CommandLine) -> None:
    breakdown = pipo("show", "smollm2", "--ram", "1GB", "-c", "4096", "--json").json["plan"]["breakdown_bytes"]
    assert breakdown["encoding"] >= 4096 * 800


def test_chat_stays_under_its_budget(pipo: CommandLine) -> None:
    process = pipo.start("chat", "smollm2", "--ram", "150MB", "-n", "24")
    assert process.stdin
    process.stdin.write(b"Tell me a story.\nAnd another one.\n")
    process.stdin.close()
    assert 0 < peak_bytes(process) <= 150_000_000
    assert process.returncode == 0
