"""The budget is a promise: the whole process stays under it, and the page cache stays out of the way."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipo.base.units import MIB
from tests.support.cgroup import memory_group

MODEL_CACHE_BYTES = 32 * MIB
SLACK_BYTES = 48 * MIB  # or 5 %: the kernel charges page tables and the file pages of libraries too

CHILD = """
import json, sys, pipo
from pipo import SamplingParams
with pipo.load(sys.argv[1], ram=sys.argv[2], context_tokens=512) as engine:
    text = "".join(engine.generate("The tide rises because", SamplingParams(max_tokens=48, temperature=0)))
    streamed, ledger = engine.plan.placement.streamed_bytes, sum(engine.ledger_breakdown.values())
    print(json.dumps({"text": text, "streamed": streamed, "ledger": ledger}), flush=True)
    sys.stdin.readline()
"""


class AnonymousPeak(threading.Thread):
    """The largest RssAnon of a process while it lives, sampled every 2 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._ended.wait(0.002):
            lines = self._status.read_text().splitlines() if self._status.exists() else []
            kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            self.peak_bytes = max([self.peak_bytes, *(k * 1024 for k in kilobytes)])

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return self.peak_bytes


@pytest.fixture(scope="module")
def _libraries_in_page_cache() -> None:
    """Else the first group to load them is charged for the libraries' own files."""
    subprocess.run([sys.executable, "-c", "import pipo.api; from pipo.compute import ggml; ggml.load()"], check=True)


@pytest.mark.cgroup
@pytest.mark.usefixtures("_libraries_in_page_cache")
@pytest.mark.parametrize("ram_bytes", [100 * MIB, 128 * MIB, 160 * MIB, 256 * MIB])
def test_process_stays_under_its_budget_inside_a_control_group(smollm2_path: Path, ram_bytes: int) -> None:
    with memory_group(ram_bytes + max(ram_bytes // 20, SLACK_BYTES)) as group:
        child = group.run([sys.executable, "-c", CHILD, str(smollm2_path), str(ram_bytes)])
        assert child.stdin and child.stdout
        peak = AnonymousPeak(child.pid)
        peak.start()
        line = child.stdout.readline()
        cache_bytes, peak_bytes = group.stat("cache"), peak.stop()
        child.communicate("\n", timeout=30)
        assert child.returncode == 0, "the process was killed or failed"
    answer = json.loads(line)
    assert answer["text"].strip()
    assert (answer["streamed"] > 0) == (ram_bytes < 200 * MIB)
    assert peak_bytes <= ram_bytes
    assert answer["ledger"] <= ram_bytes
    assert cache_bytes < MODEL_CACHE_BYTES
