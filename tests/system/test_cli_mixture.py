"""The command line with a mixture of experts: plans, answers, records of routing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.random_mixture import SHAPES, write_random_mixture
from tests.support.command_line import CommandLine

SHAPE = SHAPES["smoke-moe"]
NUM_EXPERTS = SHAPE.num_layers * SHAPE.num_experts


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mixture") / "mix.gguf"
    write_random_mixture(path, "smoke-moe")
    return str(path)


def test_an_answer_within_the_smallest_budget(pipo: CommandLine, mixture: str) -> None:
    asked = ("run", mixture, "a b c", "--raw", "--temp", "0", "-n", "8", "--ignore-eos", "--json")
    roomy = pipo(*asked)
    assert roomy.code == 0, roomy.err
    refused = pipo(*asked, "--ram", "1MB")
    assert refused.code == 2 and "expert slots" in refused.err and "Traceback" not in refused.err
    smallest = refused.err.split("smallest --ram that works is ")[1].split()[0]
    tight = pipo(*asked, "--ram", smallest)
    assert tight.code == 0, tight.err
    assert tight.json["text"] == roomy.json["text"]
    assert tight.json["plan"]["experts"]["num_slots"] < NUM_EXPERTS == roomy.json["plan"]["experts"]["num_slots"]
    experts = tight.json["cost"]["decode"]["experts"]
    assert experts["num_needed"] == 7 * SHAPE.num_layers * SHAPE.num_experts_per_tok
    assert experts["num_hits"] + experts["num_guessed"] + experts["num_missed"] == experts["num_needed"]
    assert len(experts["blocks"]) == SHAPE.num_layers and experts["blocks"][0]["recall"] is None
    assert 0 < experts["blocks"][1]["recall"] <= 1
    assert tight.json["cost"]["peak_anonymous_bytes"] <= tight.json["plan"]["limit_bytes"]


def test_words_for_a_person(pipo: CommandLine, mixture: str) -> None:
    ended = pipo("run", mixture, "a", "--raw", "-n", "4", "--ignore-eos", "-v")
    assert ended.code == 0, ended.err
    assert f"all {NUM_EXPERTS} fit" in ended.err and "a token passes 4 of 16 in each of 4 blocks" in ended.err
    assert "of experts there or foretold" in " ".join(ended.err.split()) or "needed:" in ended.err
    shown = pipo("show", mixture)
    assert "16 a block, of which a token passes 4" in shown.out and "norms and routers" in shown.out


def test_a_plan_for_a_laptop_with_a_gpu(pipo: CommandLine, mixture: str) -> None:
    """Attention and head compute there; experts stay in RAM, however much of the device is free."""
    planned = pipo("plan", mixture, "--machine", "rtx3060-laptop", "--compute", "device", "--json")
    assert planned.code == 0, planned.err
    plan = planned.json["plan"]
    assert plan["device"]["name"] == "GPU" and plan["experts"]["num_slots"] == NUM_EXPERTS
    assert plan["device"]["planned_bytes"] < 64 << 20
    assert {unit["computes_on"] for unit in plan["units"]} == {"device"}


def test_a_record_is_replayed_and_planned_with(pipo: CommandLine, mixture: str, tmp_path: Path) -> None:
    trace = tmp_path / "experts.jsonl"
    ran = pipo("run", mixture, "a b", "--raw", "-n", "30", "--ignore-eos", "--expert-trace", str(trace))
    assert ran.code == 0, ran.err
    head, *visits = [json.loads(line) for line in trace.read_text().splitlines()]
    assert head["num_blocks"] == SHAPE.num_layers and len(visits) == 30 * SHAPE.num_layers
    bench = pipo("bench", "--experts", str(trace), "--percent", "25", "--percent", "50", "--json")
    assert bench.code == 0, bench.err
    for size in bench.json["sizes"]:
        assert min(size["misses"].values()) == size["misses"]["Belady"] > 0
    shown = pipo("bench", "--experts", str(trace))
    assert shown.code == 0 and "Belady" in shown.out and "4 of 16 experts in each of 4 blocks" in shown.out
    there = ("--machine", "rtx3060-laptop", "--device", "cpu", "-c", "64", "--ram")
    smallest = pipo("plan", mixture, *there, "1MB").err.split("smallest --ram that works is ")[1].split()[0]
    there = (*there, smallest)
    assumed, recorded = (pipo("plan", mixture, *there, *more, "--json") for more in ((), ("--experts", str(trace))))
    assert assumed.code == recorded.code == 0, recorded.err
    assert "assumed" in assumed.json["plan"]["experts"]["routing"]
    assert str(trace) in recorded.json["plan"]["experts"]["routing"]
    assert assumed.json["prediction"] != recorded.json["prediction"]


def test_what_is_refused(pipo: CommandLine, mixture: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}\n")
    other = {"format": "pipo experts 1", "model": "m", "num_blocks": 1, "num_experts": 3, "num_experts_per_tok": 1}
    (tmp_path / "other").write_text(json.dumps(other) + "\n[0,[[1]]]\n")
    for arguments, code, says in (
        (("bench", "--experts", str(tmp_path / "absent")), 1, "cannot read"),
        (("bench", "--experts", str(tmp_path / "bad")), 1, "line 1: wanted the head"),
        (("bench",), 2, "--experts"),
        (("bench", "--experts", str(tmp_path / "other"), "--percent", "101"), 2, "--percent"),
        (("plan", mixture, "--experts", str(tmp_path / "other")), 2, "is of a model with 3 experts a block"),
        (("run", "smollm2", "x", "--expert-trace", str(tmp_path / "t")), 2, "has no experts"),
        (("run", mixture, "x", "--raw", "--expert-trace", str(tmp_path / "no" / "t")), 2, "--expert-trace"),
        (("run", mixture, "x", "--raw", "--vram", "1GB"), 2, "--vram"),
    ):
        ended = pipo(*arguments)
        assert ended.code == code, (arguments, ended.err)
        assert says in " ".join(ended.err.split()) and "Traceback" not in ended.err, arguments
