"""Perplexity and KL divergence against transformers, llama.cpp and numpy; and at any budget the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType
from transformers import PreTrainedModel

from pipo.engine import Engine
from pipo.generation.logprob_file import LogprobFile
from pipo.generation.scoring import Comparer, Likelihoods, Recorder, divergence_of, perplexity_of
from pipo.generation.windows import Windows
from tests.support.engines import PLENTY, smallest_ram_bytes, start_engine
from tests.support.llama_cpp import LlamaCpp
from tests.support.rounding import logit_tolerance
from tests.support.tiny_models import SPECS, FloatArray, make_model, reference_logits, rounded_model, write_gguf

SIZE, NUM_WINDOWS, VOCAB, BOS = 64, 3, 320, 1
IDS = [int(i) for i in np.random.default_rng(3).integers(300, VOCAB, SIZE * NUM_WINDOWS + 9)]
WINDOWS = Windows(IDS, SIZE, NUM_WINDOWS, BOS)
SETTINGS = {"context_tokens": SIZE, "prefill_chunk": 16, "max_outputs": 16, "layout": "plain"}
EXACT = {**SETTINGS, "cache_type_k": "f32", "cache_type_v": "f32"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(SPECS["llama"])


@pytest.fixture(scope="module")
def files(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, the same with weights that were rounded to Q4_0 and stored as F32, and as Q4_0."""
    folder = tmp_path_factory.mktemp("perplexity")
    found = {name: folder / f"{name}.gguf" for name in ("f32", "rounded", "q4_0")}
    write_gguf(model, found["f32"])
    write_gguf(rounded_model(model, GgufType.Q4_0), found["rounded"])
    write_gguf(model, found["q4_0"], GgufType.Q4_0)
    return found


def logprobs(model: PreTrainedModel) -> FloatArray:
    """transformers': of what comes next at every scored position. Shape: (positions, vocab)."""
    rows = []
    for i in range(NUM_WINDOWS):
        window = [BOS, *IDS[i * SIZE + 1 : (i + 1) * SIZE]]
        logits = reference_logits(model, window)[SIZE // 2 : SIZE - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        rows.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return np.concatenate(rows)


def came() -> list[int]:
    """The tokens that came."""
    return [IDS[i * SIZE + p] for i in range(NUM_WINDOWS) for p in range(SIZE // 2 + 1, SIZE)]


def nll_of(engine: Engine, windows: Windows = WINDOWS) -> np.ndarray:
    scorer = Likelihoods(windows, engine.model.manifest.hyper.vocab_size)
    assert sum(engine.score(windows, scorer)) == windows.num_computed
    return scorer.nll


def compare(path: Path, reference: Path, folder: Path) -> Comparer:
    with LogprobFile(folder, WINDOWS.num_scored, VOCAB) as kept:
        recorder = Recorder(WINDOWS, VOCAB, kept)
        with start_engine(reference, **EXACT) as engine:
            list(engine.score(WINDOWS, recorder))
        kept.rewind()
        comparer = Comparer(WINDOWS, VOCAB, recorder, kept)
        with start_engine(path, **EXACT) as engine:
            list(engine.score(WINDOWS, comparer))
    return comparer


def test_perplexity_is_that_of_transformers(model: PreTrainedModel, files: dict[str, Path]) -> None:
    want = -logprobs(model)[range(WINDOWS.num_scored), came()]
    with start_engine(files["f32"], **EXACT) as engine:
        found = nll_of(engine)
    np.testing.assert_allclose(found, want, atol=2e-4)
    assert perplexity_of(found, 1).perplexity.value == pytest.approx(math.exp(want.mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "gemma2", "phi3-sliding"])
def test_perplexity_of_other_families_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    """Experts, windows of attention and capped logits, with all weights in RAM and with none."""
    other = make_model(SPECS[name])
    write_gguf(other, tmp_path / "other.gguf")
    want = -logprobs(other)[range(WINDOWS.num_scored), came()]
    for ram_bytes in (smallest_ram_bytes(tmp_path / "other.gguf", **EXACT), PLENTY):
        with start_engine(tmp_path / "other.gguf", ram_bytes=ram_bytes, **EXACT) as engine:
            np.testing.assert_allclose(nll_of(engine), want, atol=2e-4)


def test_perplexity_is_that_of_llama_cpp(files: dict[str, Path]) -> None:
    """Asked position by position for the distribution after the tokens up to there."""
    oracle = LlamaCpp(files["f32"])
    window = [BOS, *IDS[1:SIZE]]
    rows = [
        oracle.greedy(window[: p + 1], 1, vocab_size=VOCAB, banned=range(259)).logprobs[0]
        for p in range(SIZE // 2, SIZE - 1)
    ]
    want = -np.array([row[IDS[p + 1]] for p, row in enumerate(rows, SIZE // 2)])
    one = Windows(IDS, SIZE, 1, BOS)
    with start_engine(files["f32"], **EXACT) as engine:
        found = nll_of(engine, one)
    np.testing.assert_allclose(found, want, atol=2e-4)


def test_passes_that_stop_anywhere_score_the_same(files: dict[str, Path]) -> None:
    found = []
    for chunk, outputs in ((63, 31), (63, 5), (7, 7), (1, 1)):
        settings = {**EXACT, "prefill_chunk": chunk, "max_outputs": outputs}
        with start_engine(files["f32"], **settings) as engine:
            found.append(nll_of(engine))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4)


@pytest.mark.parametrize("name", ["f32", "q4_0"])
def test_the_smallest_budget_gives_the_same_bits(files: dict[str, Path], name: str) -> None:
    smallest = smallest_ram_bytes(files[name], **SETTINGS)
    found = []
    for ram_bytes in (smallest, PLENTY):
        with start_engine(files[name], ram_bytes=ram_bytes, **SETTINGS) as engine:
            assert engine.plan is not None and engine.plan.is_streaming == (ram_bytes == smallest)
            found.append(nll_of(engine))
            assert sum(engine.ledger_breakdown.values()) <= ram_bytes
    assert (found[0] == found[1]).all()


def test_scoring_leaves_nothing_behind(files: dict[str, Path]) -> None:
    """Nor does it find anything: what was in the KV cache before is not of the text."""
    with start_engine(files["f32"], **SETTINGS) as engine:
        first, again = nll_of(engine), nll_of(engine)
        answer = engine.complete([1, 300, 301])
        after = nll_of(engine)
    with start_engine(files["f32"], **SETTINGS) as engine:
        assert engine.complete([1, 300, 301]).usage == answer.usage
    assert (first == again).all() and (first == after).all()


def test_a_model_does_not_diverge_from_itself(files: dict[str, Path], tmp_path: Path) -> None:
    found = divergence_of(compare(files["f32"], files["f32"], tmp_path))
    assert 0 <= found.kl_max < 1e-7
    assert found.same_top.value == found.ratio.value == 1.0


def test_divergence_of_rounded_weights_is_that_of_transformers(
    model: PreTrainedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    p, q = logprobs(model), logprobs(rounded_model(model, GgufType.Q4_0))
    want = (np.exp(p) * (p - q)).sum(axis=1)
    comparer = compare(files["rounded"], files["f32"], tmp_path)
    found = divergence_of(comparer)
    np.testing.assert_allclose(comparer.divergence, want, atol=0.5 / 2048 * np.abs(p - q).max() / 4)
    assert found.kl.value == pytest.approx(want.mean(), rel=1e-4)
    assert found.kl.value > 0.01, "rounding to four bits is seen"
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert found.same_top.value == pytest.approx(same, abs=1.5 / WINDOWS.num_scored)
    want_ratio = math.exp(np.mean(p[range(len(p)), came()] - q[range(len(q)), came()]))
    assert found.ratio.value == pytest.approx(want_ratio, rel=1e-3)


def test_divergence_of_quantised_weights(model: PreTrainedModel, files: dict[str, Path], tmp_path: Path) -> None:
    """As computed with activations rounded to 8 bits: independent noise of variance s² in every logit adds s²/2."""
    p, q = logprobs(model), logprobs(rounded_model(model, GgufType.Q4_0))
    want = (np.exp(p) * (p - q)).sum(axis=1).mean()
    noise = logit_tolerance(2, GgufType.Q4_0, q.astype(np.float32)) ** 2 / 2
    found = divergence_of(compare(files["q4_0"], files["f32"], tmp_path)).kl.value
    assert abs(found - want) < noise + 2 * math.sqrt(2 * want * 2 * noise / WINDOWS.num_scored)


def test_a_real_model_scores_as_its_logits_say(smollm2_path: Path) -> None:
    """SmolLM2, two windows of a text; logits of all positions, and numpy."""
    settings = {"context_tokens": 96, "prefill_chunk": 32, "max_outputs": 32, "layout": "plain"}
    with start_engine(smollm2_path, **settings) as engine:
        ids = engine.model.encode(Path(__file__).read_text())[:192]
        windows = Windows(ids, 96, 2)
        found = nll_of(engine, windows)
        want = []
        for i in range(2):
            # from where the scored half begins on, the same passes: 32 + 16 tokens, then 32 and 15 with outputs
            logits = engine.logits(windows.inputs(i))[48:].astype(np.float64)
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
            targets = ids[i * 96 + 49 : (i + 1) * 96]
            want.append(np.log(exponentials) + logits.max(axis=1) - logits[range(47), targets])
    np.testing.assert_allclose(found, np.concatenate(want), atol=2e-3)
    assert perplexity_of(found, 1).perplexity.value == pytest.approx(math.exp(np.mean(want)), rel=1e-3)
