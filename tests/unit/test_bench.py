"""The benches run, on a toy: every measure gives numbers, and what they say is what they measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.__main__ import MEASURES, main
from bench.anonymous_peak import AnonymousPeak
from bench.cgroup import CGROUPS, Cgroup, limit_around, memory_limit, reason_against
from bench.child import Child, ChildFailed
from bench.machine import Machine
from bench.messages import Decode, Library, PipoSetup, Plan
from bench.model_files import ModelSource, drop_cached, model_file
from bench.output import ResultFile, print_table
from bench.page_cache import cached_bytes
from bench.prompts import random_prompt
from bench.random_model import write_random_model
from bench.rows import Summary, at_least, at_most, row, skipped
from pipo.base.units import GIB, MIB

MACHINE = Machine("a CPU", 2, GIB, "Linux 6", "3.11", "ext4", "libggml 0", "abc1234+", "2026-01-02T03:04:05+00:00", 0.0)
# what must be there whatever else is installed
SUBJECTS = {
    "raw": {("raw read rate", "drive")},
    "streaming": {("pass", "pipo streaming"), ("pass", "pipo resident"), ("pass ÷ floor", "pipo streaming")},
    "ttft": {("first token of 64 ÷ floor", "pipo cold"), ("first token of 64 ÷ floor", "pipo warm")},
    "resident": {("decode", "pipo, ggml-python"), ("prefill 64", "pipo, ggml-python")},
    "memory": set[tuple[str, str]](),
    "experts": {("decode, 125% of the file", "pipo"), ("decode, 50% of the file", "pipo"), ("misses, 50%", "Belady")},
    "schedules": {("pass", "pipelined"), ("pass", "layer"), ("pass", "sequential")},
}
TOO_SMALL = {"balance", "batch"}  # measures that a toy cannot serve


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All measures on the smoke shape, one round each."""
    folder = tmp_path_factory.mktemp("bench")
    main(["--quick", "--rounds", "1", "--results", str(folder / "results"), "--scratch", str(folder / "scratch")])
    (file,) = (folder / "results").iterdir()
    assert not list((folder / "scratch").iterdir()), "random models are removed"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _of(entries: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["bench"] == measure]


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_gives_its_numbers(entries: list[dict[str, Any]], measure: str) -> None:
    rows = _of(entries, measure)
    if measure in TOO_SMALL:
        (entry,) = rows
        assert "too small" in entry["note"]
        return
    assert not [entry for entry in rows if entry["subject"] == "all"], "the measure as a whole failed"
    measured = {(entry["metric"], entry["subject"]): entry for entry in rows if "median" in entry}
    assert SUBJECTS[measure] <= measured.keys()
    for entry in measured.values():
        assert 0 <= entry["min"] <= entry["median"] <= entry["max"] < math.inf
        assert entry["count"] >= 1


def test_each_line_says_where_it_was_measured(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        assert entry["model"] == ("smoke-moe q4_0" if entry["bench"] == "experts" else "smoke q4_0")
        assert entry["library"].startswith("libggml")
        assert entry["cores"] >= 1 and entry["ram_bytes"] > 0
        assert entry["cpu"] and entry["commit"] and entry["date"]


def test_the_toy_keeps_its_budget(entries: list[dict[str, Any]]) -> None:
    peaks = [entry for entry in _of(entries, "memory") if entry["metric"].startswith("peak anonymous")]
    assert len(peaks) == 8  # four budgets, counted twice
    assert all(entry["met"] for entry in peaks)
    cached = [entry for entry in _of(entries, "memory") if entry["metric"] == "model in the page cache"]
    assert all(entry["met"] for entry in cached)


def test_an_unknown_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "'speed' is not a measure" in capsys.readouterr().err


def test_summary() -> None:
    assert Summary.of([3.0, 1.0, 2.0]) == Summary(median=2.0, min=1.0, max=3.0, count=3)


def test_targets() -> None:
    assert row("m", "s", "×", [1.0, 1.1, 5.0], at_most(1.1)).is_met is True
    assert row("m", "s", "×", [2.2], at_least(2.3)).is_met is False
    assert row("m", "s", "×", [2.2]).is_met is None
    assert skipped("m", "s", "no root").is_met is None
    assert str(at_most(1.1)) == "≤ 1.1" and str(at_least(2.3)) == "≥ 2.3"


def test_table_and_lines(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    rows = [row("pass", "pipo", "s", [0.75, 0.8123], at_most(1)), skipped("pass", "peer", "not installed")]
    print_table(console, "streaming", rows)
    assert "0.781 s" in console.export_text()
    results = ResultFile(tmp_path, MACHINE)
    results.append("streaming", "toy", rows)
    results.append("ttft", "toy", rows[:1])
    assert results.path.name == "20260102T030405-abc1234.jsonl"
    first, second, third = (json.loads(line) for line in results.path.read_text(encoding="utf-8").splitlines())
    assert (first["median"], first["target"], first["met"]) == (0.78115, "≤ 1", True)
    assert "median" not in second and second["note"] == "not installed"
    assert third["bench"] == "ttft"


def test_prompts_share_no_prefix() -> None:
    prompts = [random_prompt(16, seed, 1024) for seed in range(8)]
    assert len({prompt[0] for prompt in prompts}) == 8
    assert all(len(prompt) == 16 and all(259 <= token < 1024 for token in prompt) for prompt in prompts)
    assert random_prompt(16, 3, 1024) == prompts[3]


def test_child_survives_what_it_cannot_do(tmp_path: Path) -> None:
    with Child("pipo", environment={}) as child:
        with pytest.raises(ChildFailed, match=r"none\.gguf"):
            child.ask(Plan(PipoSetup(tmp_path / "none.gguf", GIB, 256, 1)))
        assert child.ask(Library()).startswith("libggml")


def test_death_of_a_child_is_told() -> None:
    with Child("drive", environment={}) as child:
        os.kill(child.pid, 9)
        with pytest.raises(ChildFailed, match="drive: ended with status"):
            child.ask(Decode(1))


def test_peak_is_seen_from_outside() -> None:
    with Child("pipo", environment={}) as child, AnonymousPeak(child.pid) as peak:
        child.ask(Library())
    assert MIB < peak.peak_bytes < GIB


def test_random_models_are_removed_unless_kept(tmp_path: Path) -> None:
    source = ModelSource(shape="smoke", type="q4_0")
    with model_file(source, tmp_path, keep=True) as path:
        assert path.is_file()
    assert path.is_file()
    with model_file(source, tmp_path, keep=False) as again:
        assert again == path
    assert not path.exists()


def test_page_cache_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    size = write_random_model(path, "smoke", "q4_0")
    assert path.read_bytes()
    assert cached_bytes(path) >= size - 4096
    drop_cached(path)
    assert cached_bytes(path) < size // 2


def test_limit_leaves_room_for_what_no_budget_counts() -> None:
    assert limit_around(100 * MIB) == 148 * MIB
    assert limit_around(2000 * MIB) == 2100 * MIB


def test_cgroups_of_both_versions_are_recognised(tmp_path: Path) -> None:
    assert reason_against(tmp_path) == "no memory controller of cgroups"
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    assert reason_against(tmp_path) is None


def test_what_a_group_of_version_2_tells(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 5\nfile 7\n")
    (tmp_path / "memory.events").write_text("max 2\noom_kill 1\n")
    group = Cgroup(tmp_path, is_v2=True, limit_bytes=GIB)
    assert (group.cache_bytes, group.num_reclaims, group.num_kills) == (7, 2, 1)


@pytest.mark.cgroup
@pytest.mark.skipif(reason_against(CGROUPS) is not None, reason="needs root and a memory controller")
def test_child_lives_in_its_limit() -> None:
    with memory_limit("test", 64 * MIB) as group:
        with Child("pipo", group=group, environment={}) as child:
            child.ask(Library())  # by now it has joined
            assert str(child.pid) in (group.folder / "cgroup.procs").read_text().split()
        folder = group.folder
    assert not folder.exists()


def test_a_timeline_of_each_order_is_drawn(smollm2_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.timeline", str(smollm2_path), "--ram", "125MB", "--tokens", "16"]
    subprocess.run([*command, "--results", str(tmp_path)], check=True, cwd=Path(__file__).parents[2], timeout=60)
    for name in ("layer", "pipelined"):
        drawn = (tmp_path / f"timeline-measured-{name}.svg").read_text(encoding="utf-8")
        assert f"--schedule {name}" in drawn and ">M5<" in drawn and "drive → RAM" in drawn
