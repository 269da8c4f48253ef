"""How much of a window is computed at a time: what fits, what reads least, what is refused; and whose vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from pipo import plan
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, UsageError
from pipo.engine import Engine
from pipo.generation.scoring import Likelihoods, scoring_bytes
from pipo.generation.windows import Windows
from pipo.hardware import host
from pipo.hardware.drive import DriveRate
from pipo.model_file import ModelFile
from pipo.plan import Plan
from pipo.text.vocabulary import TOKENS_KEY
from tests.support.tiny_models import TinySpec, make_model, write_gguf

SPEC = TinySpec(hidden_size=128, intermediate_size=256, num_layers=6, vocab_size=900, context_tokens=512)
WINDOWS = Windows(np.random.default_rng(1).integers(300, 900, 2000).tolist(), 256, 2, 1)
DRIVE = DriveRate(chunk_bytes=1 << 20, num_workers=8, bytes_per_s=1e9, direct=True)
KEPT = scoring_bytes(WINDOWS, SPEC.vocab_size)


@pytest.fixture(autouse=True)
def _known_drive_and_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "drive_rates", lambda files, **_: (DRIVE,))
    monkeypatch.setattr(plan.PlanMaker, "_process_bytes", lambda self: 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("evaluation") / "model.gguf"
    write_gguf(make_model(SPEC), path, GgufType.F16)
    return ModelFile(path)


def config(ram_bytes: int, **settings: int) -> EngineConfig:
    return EngineConfig(ram=str(ram_bytes), threads=1, **settings)


def plan_of(model: ModelFile, config: EngineConfig) -> Plan:
    with Engine(model, config) as engine:
        return engine.plan_windows(WINDOWS, KEPT)


def shape_of(plan: Plan) -> tuple[int, int]:
    """Tokens of a pass, and scored ones among them."""
    return plan.placement.chunk.num_tokens, plan.blueprint.num_outputs


def smallest(model: ModelFile, **settings: int) -> int:
    with pytest.raises(OverBudget) as caught:
        plan_of(model, config(1, **settings))
    assert caught.value.smallest_bytes is not None
    return caught.value.smallest_bytes


def budgets(model: ModelFile) -> Iterator[int]:
    least = smallest(model)
    yield from (least, least * 11 // 10, least * 3 // 2, least * 2, least * 50)


def test_a_roomy_budget_computes_a_window_in_one_pass(model: ModelFile) -> None:
    assert shape_of(plan_of(model, config(1 << 40))) == (255, 127)


def test_every_budget_from_the_smallest_on_is_kept_and_scores(model: ModelFile) -> None:
    results, num_passes = [], []
    for ram_bytes in budgets(model):
        scorer = Likelihoods(WINDOWS, SPEC.vocab_size)
        with Engine(model, config(ram_bytes)) as engine:
            engine.start(engine.plan_windows(WINDOWS, KEPT))
            assert sum(engine.score(WINDOWS, scorer)) == WINDOWS.num_computed
            assert sum(engine.ledger_breakdown.values()) <= ram_bytes
            num_passes.append(engine.report.prefill.num_passes if engine.report else 0)
        results.append(scorer.nll.mean())
    assert num_passes[0] > num_passes[-1] == 2
    # attention of passes of other lengths differs by the rounding of f16
    assert max(results) - min(results) < 1e-3


def test_one_byte_less_than_the_smallest_budget_is_refused(model: ModelFile) -> None:
    least = smallest(model)
    plan_of(model, config(least))
    with pytest.raises(OverBudget, match="scores") as caught:
        plan_of(model, config(least - 1))
    assert caught.value.smallest_bytes == least


def test_a_chunk_that_was_named_is_kept_at_any_budget(model: ModelFile) -> None:
    least = smallest(model, prefill_chunk=48)
    for ram_bytes in (least, 1 << 40):
        assert shape_of(plan_of(model, config(ram_bytes, prefill_chunk=48))) == (48, 48)
    with pytest.raises(OverBudget):
        plan_of(model, config(least - 1, prefill_chunk=48))


def test_less_is_read_for_a_window_than_with_any_other_passes(model: ModelFile) -> None:
    ram_bytes = smallest(model) + 400_000
    chosen = plan_of(model, config(ram_bytes))

    def read_bytes(plan: Plan) -> int:
        return len(list(WINDOWS.passes(*shape_of(plan)))) * plan.placement.streamed_bytes

    others = []
    for size in (1, 8, 32, 64):
        with suppress(OverBudget):
            others.append(read_bytes(plan_of(model, config(ram_bytes, prefill_chunk=size))))
    assert others and read_bytes(chosen) <= min(others) and read_bytes(chosen) < max(others)


def test_tokens_outside_the_vocabulary_are_refused_before_any_pass(model: ModelFile) -> None:
    windows = Windows([900] * 512, 256, 2)
    with Engine(model, config(1 << 40)) as engine:
        engine.start(engine.make_plan(256))
        with pytest.raises(UsageError, match="token id 900 is outside"):
            list(engine.score(windows, Likelihoods(windows, 900)))


def test_one_tokenizer_serves_two_files_of_one_vocabulary(model: ModelFile) -> None:
    assert ModelFile(model.path, vocabulary_of=model).tokenizer is model.tokenizer


def test_another_vocabulary_is_refused_with_what_differs(model: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(make_model(TinySpec()), path)
    with pytest.raises(UsageError, match=r"has a vocabulary of 320 tokens, .* one of 900"):
        ModelFile(path, vocabulary_of=model)
    data = model.path.read_bytes()
    changed = model.checkpoint.metadata.byte_strings(TOKENS_KEY)[700]
    at = data.index(len(changed).to_bytes(8, "little") + changed)
    path.write_bytes(data[: at + 8] + b"Q" * len(changed) + data[at + 8 + len(changed) :])
    with pytest.raises(UsageError, match=r"token 700 is 'Q+', wanted '"):
        ModelFile(path, vocabulary_of=model)
