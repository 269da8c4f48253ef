"""The comparison with peers: what a run leaves behind, on a toy, and the parts it is made of."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.child import Child, ChildFailed
from bench.engines.timed_engine import PROMPT_TOKENS
from bench.messages import Greedy, Library, PipoSetup, Start
from bench.model_files import copied
from bench.peers.__main__ import main
from bench.peers.entrants import ENTRANTS
from bench.peers.environments import NotInstalled, ensure_python
from bench.peers.report import Outcome, chart, markdown
from bench.peers.seat import Seat
from bench.peers.verdict import common_prefix
from bench.prompts import random_prompt
from bench.random_checkpoint import halves_apart, hf_name, write_random_checkpoint
from bench.random_model import SHAPES, write_random_model
from bench.rows import at_least, row, skipped
from pipo.base.units import GIB

ROOT = Path(__file__).parents[2]
ROWS = [
    row("decode", "pipo", "s", [0.5], note="libggml"),
    row("of the limit", "pipo", "%", [96.0], at_least(95)),
    row("ahead of peer", "pipo", "×", [4.0]),
    row("decode", "peer", "s", [2.0], note="mmap"),
    skipped("decode", "dead", "killed for want of memory"),
]


def test_a_checkpoint_gives_the_same_tokens_as_the_gguf(tmp_path: Path) -> None:
    write_random_model(tmp_path / "toy.gguf", "smoke", "bf16")
    write_random_checkpoint(tmp_path / "toy", "smoke")
    with Child("pipo", environment={}) as child:
        child.ask(Start(PipoSetup(tmp_path / "toy.gguf", 2 * GIB, 256, 1)))
        ours = child.ask(Greedy(8))
    prompt = torch.tensor([random_prompt(PROMPT_TOKENS, 0, SHAPES["smoke"].vocab_size)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.float32)
    theirs = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert ours == tuple(theirs[0, PROMPT_TOKENS:].tolist())


def test_rows_go_from_side_by_side_to_half_a_head_apart() -> None:
    heads_of_four = np.arange(8).reshape(8, 1)
    assert halves_apart(heads_of_four, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_names_of_a_checkpoint() -> None:
    assert hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert hf_name("output.weight") == "lm_head.weight"


def test_children_of_peers_need_no_pipo() -> None:
    blocked = "import sys; sys.modules['pipo'] = None; import bench.serve, bench.engines.timed_engine, bench.prompts"
    subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, check=True)


def test_a_child_that_takes_too_long_is_ended() -> None:
    with Child("pipo", environment={}) as child:
        with pytest.raises(ChildFailed, match="no answer within"):
            child.ask(Library(), 0.001)
        assert not child.is_alive


def test_a_peer_that_cannot_start_is_told() -> None:
    request = Start(PipoSetup(Path("none.gguf"), GIB, 256, 1))
    seat = Seat("pipo", lambda: (Child("pipo", environment={}), None), request)
    try:
        seat.start()
        seat.warm_up()
        seat.decode(1)
        seat.read_prompt(8)
    finally:
        seat.close()
    assert "none.gguf" in seat.failure and seat.prompt == seat.failure
    assert not seat.turns and not seat.token_ids


def test_an_environment_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="no-such-folder"):
        ensure_python("peer", ["--requirement=no-such-folder/packages.txt"], tmp_path)


def test_a_copy_lasts_as_long_as_the_block(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    with copied(path, "native") as copy:
        assert copy != path and copy.read_bytes() == b"weights"
        assert copy.stat().st_ino != path.stat().st_ino
    assert not copy.exists()


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((1, 2), (1, 2, 3)) == 2
    assert common_prefix((), (1,)) == 0


def test_the_table_names_the_dead() -> None:
    text = markdown([Outcome("toy", 0.5, ROWS)], "a machine")
    assert "| 50 % | peer | 2 |" in text and "4 ×" in text
    assert "| 50 % | dead | – |" in text
    assert "- 50 %: dead, decode: killed for want of memory" in text


def test_the_chart_has_a_bar_for_everybody_who_lived() -> None:
    picture = chart([Outcome("toy", 0.5, ROWS)], "toy")
    ET.fromstring(picture)
    assert "50 % peer" in picture and "0.5 s" in picture and "dead" not in picture


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers of the toy from this environment: the test fetches nothing."""
    monkeypatch.setattr("bench.peers.contest.ensure_python", lambda *_: sys.executable)
    yield


@pytest.mark.usefixtures("installed")
def test_a_quick_run(tmp_path: Path) -> None:
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    main(["--quick", "--rounds", "1", "--peers", "mapped", "--results", str(results), "--scratch", str(scratch)])
    assert not list(scratch.iterdir()), "random models and copies are removed"
    suffixes = sorted("".join(path.suffixes[-1:]) for path in results.iterdir())
    assert suffixes == [".jsonl", ".md", ".svg"]
    entries = [json.loads(line) for line in next(results.glob("*.jsonl")).read_text(encoding="utf-8").splitlines()]
    measured = {(entry["bench"], entry["metric"], entry["subject"]) for entry in entries if "median" in entry}
    for budget in ("125 %", "50 %"):
        assert (f"peers {budget}", "decode", "pipo") in measured
        told = {entry["subject"] for entry in entries if entry["bench"] == f"peers {budget}"}
        assert ENTRANTS["mapped"].title in told, "measured, or why not"
    assert ("peers 50 %", "of the limit", "pipo") in measured
    same = [entry for entry in entries if entry["metric"] == "same tokens"]
    assert all(entry["median"] == 6 for entry in same)
