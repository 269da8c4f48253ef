"""A table may be larger than memory: what a job's processes take does not grow with it."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.random_model import write_random_model

ROW_BYTES = 10_000
FEW, MANY = 2_400, 9_600  # rows: 24 and 96 MB; pyarrow makes pages of 1,024 rows, so that the smaller has whole ones
GROWTH_KB = 16 << 10  # in which the larger table finds no room
# In a process of its own: peaks of its memory and of its largest child, in KB. Not its own `ru_maxrss`, which begins
# with that of the process that started it.
PROGRAM = """
import re, resource, sys
from pathlib import Path
from pipo.jobs.batch import Batch
from tests.support.batches import EchoEngine, answer_all, settings_of

with Batch(settings_of(*map(Path, sys.argv[1:]))) as job:
    answer_all(job, EchoEngine())
    job.publish()
own = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())
print(own[1], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smoke.gguf"
    write_random_model(path, "smoke", "q4_0")
    return path


def _rows(num_rows: int) -> Iterator[dict[str, str]]:
    """Prompts of some hundred kinds; what else there is does not compress well."""
    chance = random.Random(1)
    return ({"prompt": f"row {i % 500}", "more": chance.randbytes(ROW_BYTES // 2).hex()} for i in range(num_rows))


def _write_jsonl(path: Path, num_rows: int) -> None:
    with path.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in _rows(num_rows))


def _write_csv(path: Path, num_rows: int) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "more"])
        writer.writeheader()
        writer.writerows(_rows(num_rows))


def _write_parquet(path: Path, num_rows: int) -> None:
    """All rows in one group: the largest that there can be."""
    pq.write_table(pa.Table.from_pylist(list(_rows(num_rows))), path, row_group_size=num_rows, use_dictionary=False)
    assert pq.ParquetFile(path).metadata.num_row_groups == 1


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", _write_jsonl), ("csv", _write_csv), ("parquet", _write_parquet)]
)
def test_memory_does_not_grow_with_the_table(
    model: Path, tmp_path: Path, suffix: str, write: Callable[[Path, int], None]
) -> None:
    peaks = []
    for num_rows in (FEW, MANY):
        table, out = tmp_path / f"in{num_rows}.{suffix}", tmp_path / f"out{num_rows}.{suffix}"
        write(table, num_rows)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(model), str(table), str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert out.stat().st_size > (0.4 if suffix == "parquet" else 1.0) * num_rows * ROW_BYTES
        peaks.append([int(word) for word in done.stdout.split()])
        table.unlink()
    assert all(many - few < GROWTH_KB for few, many in zip(*peaks, strict=True)), peaks
