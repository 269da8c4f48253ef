"""What constraints take is at most what is charged for them before the start, hostile ones included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipo.generation.constraints import KEPT_BYTES, MAKING_BYTES
from tests.support.hostile_constraints import hostile_constraints

# in a process of its own, whose peak the kernel counts from the moment that is asked for
_WATCHED = """
import sys
from pathlib import Path
import numpy as np
from pipo.base.errors import UsageError
from pipo.generation.constraints import Grammars
from pipo.generation.grammar_tokens import grammar_tokens_bytes
from pipo.generation.request import ConstraintKind, ConstraintSpec
from pipo.hardware.memory import process_memory, release_free_memory
from pipo.model_file import ModelFile
from tests.support.hostile_constraints import hostile_constraints

def begin():
    release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory().resident_bytes

tokenizer = ModelFile(Path(sys.argv[1])).tokenizer
num_rows = tokenizer.vocab_size
declared, before = grammar_tokens_bytes(tokenizer, num_rows), begin()
grammars = Grammars(tokenizer, num_rows)
print(process_memory().peak_resident_bytes - before, declared)
logits, rng, num_taken = np.zeros(num_rows, np.float32), np.random.default_rng(0), 0
grammars.constraint(ConstraintSpec(ConstraintKind.JSON_OBJECT)).apply(logits)
before = begin()
try:
    constraint = grammars.constraint(hostile_constraints()[sys.argv[2]])
    while num_taken < 200 and not constraint.is_finished:
        token_id = int(rng.choice(np.flatnonzero(constraint.apply(logits, goes_on=True) > -np.inf)))
        if token_id in tokenizer.end_ids:
            break
        constraint.take(token_id)
        num_taken += 1
except UsageError:
    pass
print(process_memory().peak_resident_bytes - before, num_taken)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel has to count")
@pytest.mark.parametrize(
    "name",
    [
        "many optional",
        "many required",
        "many patterns",
        "a million letters",
        "the largest multiple",
        "repeats of repeats",
        "classes",
        "far looks back",
        "doubling terminals",
        "ambiguous",
        "intersection",
    ],
)
def test_no_constraint_takes_more_than_is_charged(smollm2_path: Path, name: str) -> None:
    assert name in hostile_constraints()
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(smollm2_path), name],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    (built, declared), (taken, _) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert 0 < built <= declared
    assert taken <= MAKING_BYTES + KEPT_BYTES, f"{taken / 2**20:.1f} MiB"
