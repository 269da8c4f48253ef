"""What was predicted and what came of it is kept, line by line, and never without end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipo.hardware import predictions
from pipo.hardware.predictions import Outcome, keep_outcome

OUTCOME = Outcome("m.gguf", 1 << 30, "", "repacked Q4_0", 16, 2.5, 2.4, 1.0, 1.1)


def test_a_line_for_every_answer(tmp_path: Path) -> None:
    file = tmp_path / "new" / "predictions.jsonl"
    for _ in range(3):
        keep_outcome(OUTCOME, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 3 and all(line["tokens_per_s"] == 2.4 and line["date"] for line in lines)


def test_the_older_half_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MOST_LINES", 10)
    file = tmp_path / "predictions.jsonl"
    for _ in range(25):
        keep_outcome(OUTCOME, file)
    assert 5 <= len(file.read_text().splitlines()) <= 11


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep_outcome(OUTCOME, tmp_path / "file" / "predictions.jsonl")
