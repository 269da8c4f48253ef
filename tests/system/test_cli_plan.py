"""`pipo plan`: for this machine and for others, from a header alone, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipo.hardware import profiles
from pipo.model_file import ModelFile
from tests.support.command_line import CommandLine, Ended
from tests.support.header_only import LLAMA_7B, LLAMA_70B, sparse, write_header

THERE = ("--machine", "rtx3060-laptop")


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_header(tmp_path_factory.mktemp("header"), LLAMA_7B))


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_header(tmp_path_factory.mktemp("header"), LLAMA_70B))


def plan(pipo: CommandLine, *arguments: str) -> Any:
    ended = pipo("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    return ended.json


def test_another_machine_from_a_header_alone(pipo: CommandLine, llama_70b: str) -> None:
    """More than both memories hold: some blocks on the GPU, some in RAM, the rest on the drive, which binds."""
    found = plan(pipo, llama_70b, *THERE)
    assert {unit["home"] for unit in found["plan"]["units"]} == {"disk", "ram", "device"}
    assert found["plan"]["limit_bytes"] == profiles.load("rtx3060-laptop").ram_bytes
    assert found["plan"]["planned_bytes"] <= found["plan"]["limit_bytes"]
    assert found["plan"]["device"]["planned_bytes"] <= found["plan"]["device"]["limit_bytes"] == 6 << 30
    prediction = found["prediction"]
    floor_s = found["plan"]["streamed_bytes_per_pass"] / 3.5e9
    assert prediction["pass_s"] == pytest.approx(floor_s, rel=0.05)
    assert prediction["limit"]["lane"] == "drive" and prediction["busy"]["drive"] > 0.95
    gains = [change["gain"] for change in found["what_would_help"]]
    assert gains == sorted(gains, reverse=True) and "drive" in found["what_would_help"][0]["what"]


def test_words_for_a_person(pipo: CommandLine, llama_7b: str) -> None:
    ended = pipo("plan", llama_7b, *THERE, "--ram", "4GB", "--vram", "2GB")
    assert ended.code == 0 and ended.err == ""
    for word in (
        "RTX 3060",
        "GPU computes",
        "stay in RAM",
        "tokens/s",
        "first token",
        "busy",
        "limit",
        "memory of GPU",
    ):
        assert word in ended.out
    assert "what would help most" in ended.out and "+" in ended.out and "is gained by" in ended.out
    assert "\x1b" not in ended.out


def test_a_sparse_file_is_a_header(pipo: CommandLine, tmp_path: Path, llama_7b: str) -> None:
    whole = sparse(write_header(tmp_path, LLAMA_7B), 4_000_000_000)
    assert not ModelFile(whole, header_only=True).has_weights
    assert plan(pipo, str(whole), *THERE)["prediction"] == plan(pipo, llama_7b, *THERE)["prediction"]


def test_a_header_is_for_plans_alone(pipo: CommandLine, llama_7b: str) -> None:
    for verb in (("run", llama_7b, "hi"), ("show", llama_7b)):
        ended = pipo(*verb)
        assert ended.code == 1 and "download it again" in ended.err


def test_more_memory_less_streaming_more_speed(pipo: CommandLine, llama_7b: str) -> None:
    found = [plan(pipo, llama_7b, *THERE, "--device", "cpu", "--ram", ram) for ram in ("1GB", "2GB", "50%")]
    streamed = [each["plan"]["streamed_bytes_per_pass"] for each in found]
    rates = [each["prediction"]["tokens_per_s"] for each in found]
    assert streamed == sorted(streamed, reverse=True) and streamed[-1] == 0
    assert rates == sorted(rates)
    assert found[0]["plan"]["device"] is None


def test_context_and_workload_are_what_was_asked_for(pipo: CommandLine, llama_7b: str) -> None:
    typical = plan(pipo, llama_7b, *THERE)
    assert typical["workload"]["prompt_tokens"] == typical["workload"]["answer_tokens"] == 256
    assert typical["plan"]["context_tokens"] == 512
    full = plan(pipo, llama_7b, *THERE, "-c", "4096")
    assert full["workload"]["prompt_tokens"] == 4096 - 256
    own = plan(pipo, llama_7b, *THERE, "-c", "4096", "--prompt-tokens", "10", "--answer-tokens", "20")
    assert (own["workload"]["prompt_tokens"], own["workload"]["answer_tokens"]) == (10, 20)
    assert own["plan"]["context_tokens"] == 4096
    assert own["prediction"]["ttft_s"] < full["prediction"]["ttft_s"]


def test_a_batch_takes_memory_for_every_sequence(pipo: CommandLine, llama_7b: str) -> None:
    there = (llama_7b, *THERE, "--device", "cpu")
    one, eight = (plan(pipo, *there, "--batch", batch) for batch in ("1", "8"))
    kv = [each["plan"]["breakdown_bytes"]["KV cache"] for each in (one, eight)]
    assert kv[1] == 8 * kv[0]
    assert eight["prediction"]["tokens_per_s"] > one["prediction"]["tokens_per_s"]
    assert "num_sequences=N" in pipo("plan", *there, "--batch", "8").out


def test_this_machine_is_planned_as_a_run_would_be(pipo: CommandLine) -> None:
    same = ("--ram", "125MB", "-c", "300")
    found = plan(pipo, "smollm2", *same, "--prompt-tokens", "30")
    assert found["prediction"]["tokens_per_s"] > 0 and found["plan"]["device"] is None
    ran = pipo("run", "smollm2", "hi", "--json", "-n", "1", *same).json["plan"]
    for key in ("limit_bytes", "weight_bytes", "streamed_bytes_per_pass", "context_tokens", "drive_bytes_per_s"):
        assert found["plan"][key] == pytest.approx(ran[key], rel=0.2), key


def test_a_header_on_this_machine_takes_figures_from_an_earlier_run(
    pipo: CommandLine, llama_7b: str, tmp_path: Path
) -> None:
    assert plan(pipo, "smollm2", "--ram", "400MB")["prediction"]
    assert plan(pipo, llama_7b, "--ram", "2GB")["prediction"]["tokens_per_s"] > 0
    ended = pipo("plan", llama_7b, "--ram", "2GB", XDG_CACHE_HOME=str(tmp_path))
    assert ended.code == 2 and "--machine NAME" in ended.err


def test_a_profile_s_file_may_be_what_doctor_printed(pipo: CommandLine, llama_7b: str, tmp_path: Path) -> None:
    profile = profiles.load("rtx3060-laptop")
    plain, printed = tmp_path / "plain.json", tmp_path / "printed.json"
    plain.write_text(profile.to_json())
    printed.write_text(json.dumps({"profile": {"measured_now_because": None} | json.loads(profile.to_json())}))
    wanted = plan(pipo, llama_7b, *THERE)["prediction"]
    assert all(plan(pipo, llama_7b, "--machine", str(file))["prediction"] == wanted for file in (plain, printed))


def refused(ended: Ended, code: int, *says: str) -> None:
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("error: ") and "Traceback" not in ended.err and "bug" not in ended.err
    assert "\n" not in ended.err.split("\n\nhint")[0].strip() or "·" in ended.err
    for words in says:
        assert words in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((*THERE, "--ram", "100MB"), 2, ("needs", "the limit is 95.4 MiB", "the smallest --ram that works is")),
        ((*THERE, "--vram", "10MB", "--compute", "device"), 2, ("GPU would need", "--vram")),
        (
            ("--machine", "cray-1"),
            2,
            ("'cray-1'", "no such machine or file", "rtx3060-laptop, rtx5060-laptop, t4-208gb"),
        ),
        (("--machine", "/"), 2, ("cannot be read",)),
        ((*THERE, "--vram", "2GB", "--device", "cpu"), 2, ("contradict",)),
        ((*THERE, "--device", "Vulkan7"), 2, ("'Vulkan7' is not of this machine: it has GPU",)),
        ((*THERE, "-t", "4"), 2, ("--threads and --machine contradict",)),
        ((*THERE, "--svg", "curve.svg"), 2, ("--svg needs --advise",)),
        ((*THERE, "--advise", "--svg", "/no/such/folder/c.svg"), 2, ("there is no folder /no/such/folder",)),
        ((*THERE, "--ram", "0"), 2, ("must be more than zero",)),
        ((*THERE, "--ram", "-4GB"), 2, ("is not a size",)),
        ((*THERE, "--ram", "120%"), 2, ("at most 100%",)),
        ((*THERE, "--vram", "much"), 2, ("--vram 'much' is not a size",)),
        ((*THERE, "--batch", "0"), 2, ("--batch",)),
        ((*THERE, "--prompt-tokens", "0"), 2, ("--prompt-tokens",)),
        ((*THERE, "--answer-tokens", "-1"), 2, ("--answer-tokens",)),
        ((*THERE, "-c", "0"), 2, ("--ctx-size",)),
        ((*THERE, "-c", "100", "--prompt-tokens", "100"), 2, ("do not fit the context of 100", "or a larger -c")),
        ((*THERE, "--prompt-tokens", "40000"), 2, ("do not fit the model's context of 32768",)),
        ((*THERE, "-c", "40000"), 2, ("exceeds the 32768 the model was trained for",)),
        ((*THERE, "--batch", "4096", "-c", "32768"), 2, ("needs", "KV cache")),
    ],
)
def test_what_cannot_be_planned_is_one_clear_message(
    pipo: CommandLine, llama_7b: str, arguments: tuple[str, ...], code: int, says: tuple[str, ...]
) -> None:
    refused(pipo("plan", llama_7b, *arguments), code, *says)


def test_a_device_s_memory_needs_a_device(pipo: CommandLine, llama_7b: str, tmp_path: Path) -> None:
    profile = json.loads(profiles.load("rtx3060-laptop").to_json())
    file = tmp_path / "no-gpu.json"
    file.write_text(json.dumps(profile | {"devices": profile["devices"][:1]}))
    refused(pipo("plan", llama_7b, "--machine", str(file), "--vram", "2GB"), 2, "has no device besides the CPU")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be JSON"),
        ("{}", "must be"),
        ("[1]", "must be"),
        ('{"profile": {"name": 3}}', "must be"),
        ("\x00\xff", "must be JSON"),
    ],
)
def test_a_corrupt_profile_names_its_file(
    pipo: CommandLine, llama_7b: str, tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "there.json"
    file.write_bytes(text.encode("latin-1"))
    refused(pipo("plan", llama_7b, "--machine", str(file)), 1, str(file), says, "doctor --probe --json")


def test_a_profile_that_was_cut_off_names_its_file(pipo: CommandLine, llama_7b: str, tmp_path: Path) -> None:
    file = tmp_path / "there.json"
    file.write_text(profiles.load("t4-208gb").to_json()[:999])
    refused(pipo("plan", llama_7b, "--machine", str(file)), 1, str(file), "must be JSON")


def test_advice_on_a_batch_as_text_json_and_picture(pipo: CommandLine, llama_7b: str, tmp_path: Path) -> None:
    file = tmp_path / "curve.svg"
    there = (llama_7b, *THERE, "--device", "cpu", "--advise", "--svg", str(file))
    found = plan(pipo, *there)["batch"]
    numbers = [point["num_sequences"] for point in found["points"]]
    assert numbers == [1 << i for i in range(len(numbers))] and len(numbers) > 2
    best = next(point for point in found["points"] if point["num_sequences"] == found["best_num_sequences"])
    assert 0.95 * found["plateau_tokens_per_s"] <= best["tokens_per_s"] <= found["plateau_tokens_per_s"]
    assert found["ending"] in ("memory", "kv_traffic", "compute", "weights")
    drawn = ElementTree.parse(file).getroot()
    assert drawn.tag.endswith("svg") and "within" not in file.read_text()
    shown = pipo("plan", *there).out.split("\nbatch\n")[1]
    assert "num_sequences=N" in shown and shown.count("◀") == 1 and len(shown.splitlines()) <= 20
    assert plan(pipo, *there[:-3])["batch"] is None


def test_a_picture_that_cannot_be_written_is_said(pipo: CommandLine, llama_7b: str, tmp_path: Path) -> None:
    refused(pipo("plan", llama_7b, *THERE, "--advise", "--svg", str(tmp_path)), 2, "--svg", "cannot be written")


@pytest.mark.parametrize(("key", "value"), [("ram_bytes", 10**400), ("num_cores", -1)])
def test_a_profile_of_no_machine_is_refused(
    pipo: CommandLine, llama_7b: str, tmp_path: Path, key: str, value: int
) -> None:
    """Figures from a file must not end in infinities."""
    file = tmp_path / "there.json"
    file.write_text(json.dumps(json.loads(profiles.load("t4-208gb").to_json()) | {key: value}))
    refused(pipo("plan", llama_7b, "--machine", str(file)), 1, str(file), key)


def test_a_device_that_is_of_no_use_is_said(pipo: CommandLine, llama_7b: str) -> None:
    ended = pipo("plan", llama_7b, *THERE, "--vram", "10MB")
    assert ended.code == 0 and "GPU is left out" in ended.out


def test_more_than_the_machine_has_is_planned_with_a_warning(pipo: CommandLine, llama_7b: str) -> None:
    ended = pipo("plan", llama_7b, *THERE, "--ram", "64GiB", "--vram", "24GiB")
    assert ended.code == 0 and ended.err.count("warning:") == 2
    assert "--ram 64.0 GiB is more than the 16.0 GiB that the machine has" in ended.err
