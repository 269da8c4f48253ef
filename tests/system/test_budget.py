"""The budget is a promise: the whole process stays under it, and the page cache stays out of the way."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from pipo.base.units import MIB
from tests.support.cgroup import memory_group

MODEL_CACHE_BYTES = 32 * MIB
SLACK_BYTES = 48 * MIB  # or 5 %: the kernel charges page tables, sockets and file pages of libraries too

CHILD = """
import json, sys, pipo
from pipo import SamplingParams
with pipo.load(sys.argv[1], ram=sys.argv[2], context_tokens=512) as engine:
    print(json.dumps({"streamed": engine.plan.placement.streamed_bytes}), flush=True)
    text = "".join(engine.generate("The tide rises because", SamplingParams(max_tokens=48, temperature=0)))
    print(json.dumps({"text": text, "ledger": sum(engine.ledger_breakdown.values())}), flush=True)
    sys.stdin.readline()
"""


def _anonymous_peak_of(pid: int, until: object) -> int:
    """Largest RssAnon of a process, sampled every 2 ms until `until()` is true."""
    peak = 0
    while not until():  # type: ignore[operator]
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)
    return peak


@pytest.mark.cgroup
@pytest.mark.parametrize("ram_bytes", [112 * MIB, 128 * MIB, 160 * MIB, 256 * MIB])
def test_process_stays_under_its_budget_inside_a_control_group(smollm2_path: Path, ram_bytes: int) -> None:
    with memory_group(ram_bytes + max(ram_bytes // 20, SLACK_BYTES)) as group:
        child = group.run([sys.executable, "-c", CHILD, str(smollm2_path), str(ram_bytes)], stdin=-1, stdout=-1)
        assert child.stdin and child.stdout
        plan = json.loads(child.stdout.readline())
        lines: list[str] = []
        deadline = time.monotonic() + 60

        def answered() -> bool:
            if child.poll() is not None or time.monotonic() > deadline:
                return True
            import select

            if select.select([child.stdout], [], [], 0)[0]:
                lines.append(child.stdout.readline() if child.stdout else "")
                return True
            return False

        peak = _anonymous_peak_of(child.pid, answered)
        cache_bytes = group.stat("cache")
        child.stdin.write("\n")
        child.stdin.close()
        assert child.wait(30) == 0, "the process was killed or failed"
    answer = json.loads(lines[0])
    assert answer["text"].strip()
    assert (plan["streamed"] > 0) == (ram_bytes < 200 * MIB)
    assert peak <= ram_bytes
    assert answer["ledger"] <= ram_bytes
    assert cache_bytes < MODEL_CACHE_BYTES
