"""Predicted against measured, a line for every answer, in `$XDG_CACHE_HOME/pipo/predictions.jsonl`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipo.base.folders import cache_folder

log = logging.getLogger(__name__)

MOST_LINES = 1000  # beyond, the older half goes


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one answer: what was planned for it, tokens per second and seconds to the first token."""

    model: str
    ram_bytes: int
    device: str
    layout: str
    chunk_tokens: int
    predicted_tokens_per_s: float
    tokens_per_s: float
    predicted_ttft_s: float
    ttft_s: float


def predictions_file(environment: Mapping[str, str] = os.environ) -> Path:
    return cache_folder(environment) / "predictions.jsonl"


def keep_outcome(outcome: Outcome, file: Path | None = None) -> None:
    """Append it. A file that cannot be written costs a line in the log, never the answer."""
    file = file or predictions_file()
    line = json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(outcome)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
        _shorten(file)
    except OSError as error:
        log.debug("predictions=%s action=skip reason=%s", file, error.strerror)


def _shorten(file: Path) -> None:
    if file.stat().st_size < MOST_LINES * 200:  # a line takes more
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) > MOST_LINES:
        short = file.with_suffix(".tmp")
        short.write_text("".join(lines[-MOST_LINES // 2 :]), encoding="utf-8")
        short.replace(file)
