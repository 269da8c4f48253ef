"""LoRA adapters at inference: what `transformers` computes with the weights merged by hand, wherever weights live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType
from transformers import PreTrainedModel

from bench.random_model import write_random_model
from pipo.base.adapter import AdapterChoice, AdapterId
from pipo.base.config import SCHEDULE_NAMES, EngineConfig
from pipo.base.manifest import RopeLayout
from pipo.formats import checkpoint
from pipo.generation.request import SamplingParams
from pipo.pipeline.adapters import Weights
from pipo.pipeline.forward import Forward
from tests.support import tiny_models
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.llama_cpp import LlamaCpp
from tests.support.random_adapters import write_random_adapter
from tests.support.rigs import Rig, read_prompts
from tests.support.rounding import logit_tolerance
from tests.support.tiny_adapters import ATTENTION, TinyAdapter, merged, write_gguf_adapter, write_peft
from tests.support.tiny_models import (
    MIXTURES,
    SPECS,
    FloatArray,
    TinySpec,
    make_model,
    reference_logits,
    rounded_model,
    write_gguf,
)
from tests.support.truth import relative_error

MAX_ERROR = 1e-4  # largest difference over largest logit, at each position
NUM_TOKENS, NUM_NEW = 70, 6
NOT_TEXT = range(259)  # specials and bytes
F32_CACHE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
MODELS = {**SPECS, "llama-three": TinySpec(num_layers=3, seed=21)}
ADAPTERS = {
    "all": TinyAdapter(seed=1),
    "attention": TinyAdapter(rank=3, alpha=5.0, targets=ATTENTION, seed=2),
    "stabilised": TinyAdapter(rank=8, alpha=4.0, use_rslora=True, seed=3),
    "patterns": TinyAdapter(
        seed=4, rank_pattern={"layers.0.mlp.up_proj": 2, "k_proj": 6}, alpha_pattern={"v_proj": 3.0}
    ),
    "one-block": TinyAdapter(targets=("o_proj", "up_proj"), rank=1, alpha=1.0, seed=5, layers=(1,)),
}
GGUF_ABLE = [name for name, each in ADAPTERS.items() if not each.use_rslora and not each.alpha_pattern]


@lru_cache
def model_of(name: str) -> PreTrainedModel:
    return make_model(MODELS[name])


def tokens_of(name: str, num: int = NUM_TOKENS, seed: int = 7) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, MODELS[name].vocab_size, num)]


@lru_cache
def truth_of(name: str, *parts: tuple[str, float]) -> FloatArray:
    model = merged(model_of(name), *((ADAPTERS[each], scale) for each, scale in parts))
    return reference_logits(model, tokens_of(name))


class Files:
    """Of models and adapters, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, name: str, type: GgufType = GgufType.F32) -> Path:
        path = self._folder / f"{name}-{type.name}.gguf"
        if not path.exists():
            write_gguf(model_of(name), path, type)
        return path

    def adapter(self, model: str, name: str, form: str) -> Path:
        path = self._folder / f"{model}-{name}{'.gguf' if form == 'gguf' else ''}"
        if not path.exists():
            (write_gguf_adapter if form == "gguf" else write_peft)(model_of(model), ADAPTERS[name], path)
        return path

    def choices(self, model: str, form: str, *parts: tuple[str, float]) -> tuple[AdapterChoice, ...]:
        return tuple(AdapterChoice(self.adapter(model, name, form), scale) for name, scale in parts)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("adapters"))


FORMS = [("peft", name) for name in ADAPTERS] + [("gguf", name) for name in GGUF_ABLE]


def test_an_adapter_shows(files: Files) -> None:
    """Else the tests below could not see it missing."""
    for name in ADAPTERS:
        assert relative_error(truth_of("llama"), truth_of("llama", (name, 1.0))) > 1000 * MAX_ERROR


@pytest.mark.parametrize(("form", "name"), FORMS)
@pytest.mark.parametrize("chunk", [1, 33, NUM_TOKENS])
def test_float32(form: str, name: str, chunk: int, files: Files) -> None:
    settings = {"max_outputs": chunk, "prefill_chunk": chunk, **F32_CACHE}
    lora = files.choices("llama", form, (name, 1.0))
    with start_engine(files.model("llama"), lora=lora, **settings) as engine:
        got = engine.logits(tokens_of("llama"))
        assert relative_error(engine.logits(tokens_of("llama"), adapters={}), truth_of("llama")) < MAX_ERROR
    assert relative_error(got, truth_of("llama", (name, 1.0))) < MAX_ERROR


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_streamed_is_resident_bit_for_bit(form: str, name: str, files: Files) -> None:
    settings = {"max_outputs": 33, "prefill_chunk": 33, **F32_CACHE}
    path, lora = files.model("llama-three"), files.choices("llama-three", form, (name, 1.0))
    smallest = smallest_ram_bytes(path, lora=lora, **settings)
    with start_engine(path, lora=lora, **settings) as engine:
        resident = engine.logits(tokens_of("llama-three"))
        assert engine.plan is not None and not engine.plan.is_streaming
    with start_engine(path, ram_bytes=smallest, lora=lora, **settings) as engine:
        streamed = engine.logits(tokens_of("llama-three"))
        assert engine.plan is not None and engine.plan.is_streaming
    np.testing.assert_array_equal(streamed.view(np.uint32), resident.view(np.uint32))
    assert relative_error(streamed, truth_of("llama-three", (name, 1.0))) < MAX_ERROR


@pytest.mark.parametrize("model", [name for name in SPECS if name not in MIXTURES])
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_every_family(model: str, form: str, files: Files) -> None:
    """All linear modules of a block; rows of queries and keys in the model's order, for every shape of heads."""
    lora = files.choices(model, form, ("all", 0.5))
    with start_engine(files.model(model), lora=lora, max_outputs=NUM_TOKENS, **F32_CACHE) as engine:
        got = engine.logits(tokens_of(model))
    assert relative_error(got, truth_of(model, ("all", 0.5))) < MAX_ERROR


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_model_whose_rows_lie_as_hugging_face_has_them(
    form: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated pairs as halves of a head, in an architecture whose converter makes neighbours of them."""
    adapter = files.adapter("llama", "all", form)
    monkeypatch.setattr(tiny_models, "PERMUTED", ())
    write_gguf(model_of("llama"), tmp_path / "halves.gguf")
    read = checkpoint.read_hyper_parameters

    def with_halves(*arguments: Any) -> Any:
        hyper, extra = read(*arguments)
        return replace(hyper, rope=replace(hyper.rope, layout=RopeLayout.NEOX)), extra

    monkeypatch.setattr(checkpoint, "read_hyper_parameters", with_halves)
    lora = (AdapterChoice(adapter),)
    with start_engine(tmp_path / "halves.gguf", lora=lora, max_outputs=NUM_TOKENS, **F32_CACHE) as engine:
        got = engine.logits(tokens_of("llama"))
    assert relative_error(got, truth_of("llama", ("all", 1.0))) < MAX_ERROR


@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_mixtures(model: str, form: str, files: Files) -> None:
    """Attention, and of Qwen 2 the shared expert."""
    lora = files.choices(model, form, ("all", 1.0))
    with start_engine(files.model(model), lora=lora, max_outputs=NUM_TOKENS, **F32_CACHE) as engine:
        got = engine.logits(tokens_of(model))
    assert relative_error(got, truth_of(model, ("all", 1.0))) < MAX_ERROR


def test_scales_and_several_adapters(files: Files) -> None:
    parts = (("all", -0.7), ("attention", 1.5), ("patterns", 0.25))
    lora = files.choices("llama", "peft", *parts)
    with start_engine(files.model("llama"), lora=lora, max_outputs=NUM_TOKENS, **F32_CACHE) as engine:
        names = list(engine.adapters)
        assert relative_error(engine.logits(tokens_of("llama")), truth_of("llama", *parts)) < MAX_ERROR
        for name, (adapter, scale) in zip(names, parts, strict=True):
            alone = engine.logits(tokens_of("llama"), adapters=name)
            assert relative_error(alone, truth_of("llama", (adapter, scale))) < MAX_ERROR
        other = engine.logits(tokens_of("llama"), adapters={names[2]: 2.0, names[0]: 1.0})
        assert relative_error(other, truth_of("llama", ("all", 1.0), ("patterns", 2.0))) < MAX_ERROR


@pytest.mark.parametrize("type", [GgufType.Q8_0, GgufType.Q4_0])
@pytest.mark.parametrize("layout", ["plain", "repacked"])
@pytest.mark.parametrize("chunk", [1, NUM_TOKENS])
def test_on_quantised_weights(type: GgufType, layout: str, chunk: int, files: Files) -> None:
    """What is left is how kernels round activations; the adapter itself stays as exact as its file."""
    settings = {"layout": layout, "max_outputs": chunk, "prefill_chunk": chunk, **F32_CACHE}
    with start_engine(
        files.model("llama", type), lora=files.choices("llama", "gguf", ("all", 1.0)), **settings
    ) as engine:
        got = engine.logits(tokens_of("llama"))
    want = reference_logits(merged(rounded_model(model_of("llama"), type), (ADAPTERS["all"], 1.0)), tokens_of("llama"))
    error = float(np.sqrt(np.mean(np.square(got - want))))
    assert error < logit_tolerance(SPECS["llama"].num_layers, type, want)


@pytest.mark.parametrize("type", [GgufType.F16, GgufType.BF16, GgufType.Q8_0])
def test_adapters_of_other_types(type: GgufType, files: Files, tmp_path: Path) -> None:
    """They stay as they are stored; what is left is how kernels round what they multiply with."""
    adapter = TinyAdapter(rank=32, seed=6)
    path = write_gguf_adapter(model_of("llama"), adapter, tmp_path / "a.gguf", type)
    with start_engine(files.model("llama"), lora=(AdapterChoice(path),), max_outputs=NUM_TOKENS, **F32_CACHE) as engine:
        got = engine.logits(tokens_of("llama"))
    want = reference_logits(merged(model_of("llama"), (adapter, 1.0), type=type), tokens_of("llama"))
    error = float(np.sqrt(np.mean(np.square(got - want))))
    # twice as many products in a row as without
    assert error < 2 * logit_tolerance(SPECS["llama"].num_layers, type, want)


@pytest.mark.parametrize("layout", ["plain", "repacked"])
def test_every_budget_and_schedule(layout: str, tmp_path: Path) -> None:
    """Batches whose sequences have different adapters, bit for bit as with all weights in RAM."""
    write_random_model(tmp_path / "model.gguf", "smoke", "q4_0")
    names = [tmp_path / f"{name}.gguf" for name in "ab"]
    for seed, path in enumerate(names):
        write_random_adapter(tmp_path / "model.gguf", path, rank=3 + seed, strength=1.0, seed=seed)
    prompts = [list(range(5, 45)), [7, 8, 9], list(range(100, 117))]
    weights: list[Weights] = [{AdapterId("a"): 1.0}, {AdapterId("b"): 0.5, AdapterId("a"): 0.1}, {}]

    def together(forward: Forward) -> FloatArray:
        forward.use_adapters(weights)
        rows = [read_prompts(forward, prompts, 16)]
        for i in range(3):
            tokens = [int(row.argmax()) for row in rows[-1]]
            rows.append(forward.run_batch(tokens, [len(prompt) + i for prompt in prompts]).copy())
        forward.forget()
        return np.stack(rows)

    config = EngineConfig(layout=layout, prefill_chunk=16, threads=1, num_sequences=3)
    with Rig(tmp_path / "model.gguf", config) as plain:
        if layout == "repacked" and not plain.blueprint.layouts.repacked:
            pytest.skip("this CPU has no repacked kernels")
        rig = plain.with_adapters(*names)
        with rig.running(rig.all_resident()) as forward:
            want = together(forward)
        for placement in rig.placements(4):
            for schedule in SCHEDULE_NAMES:
                with rig.running(placement, schedule=schedule) as forward:
                    for _ in range(2):
                        np.testing.assert_array_equal(together(forward).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("is_tight", [False, True])
def test_a_batch_whose_sequences_have_different_adapters(is_tight: bool, files: Files) -> None:
    settings: dict[str, Any] = {"num_sequences": 3, "prefill_chunk": 16, **F32_CACHE}
    path, lora = files.model("llama-three"), files.choices("llama-three", "peft", ("all", 1.0), ("patterns", 1.0))
    ram = {"ram_bytes": smallest_ram_bytes(path, lora=lora, **settings)} if is_tight else {}
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, logprobs=0, ignore_eos=True)
    prompts = [tokens_of("llama-three", length, seed=length) for length in (9, 40, 23)]
    with start_engine(path, lora=lora, **ram, **settings) as engine:
        a, b = engine.adapters
        sets: Sequence[Any] = [a, {b: 0.5}, {}]
        batch = engine.complete_batch(prompts, params, adapters=sets)
        alone = [engine.complete(p, params, adapters=each) for p, each in zip(prompts, sets, strict=True)]
    parts = [[(ADAPTERS["all"], 1.0)], [(ADAPTERS["patterns"], 0.5)], []]
    for prompt, mine, want, part in zip(prompts, batch, alone, parts, strict=True):
        assert mine.token_ids == want.token_ids
        logits = reference_logits(merged(model_of("llama-three"), *part), [*prompt, *mine.token_ids])
        logits = logits.astype(np.float64)[len(prompt) - 1 : -1]
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        picked = expected[np.arange(NUM_NEW), list(mine.token_ids)]
        tolerance = 2 * MAX_ERROR * np.abs(logits).max()
        assert np.abs(picked - [token.logprob for token in mine.tokens]).max() < tolerance
        assert (expected.max(axis=1) - picked).max() < tolerance


def test_llama_cpp_computes_the_same(files: Files) -> None:
    path, adapter = files.model("llama"), files.adapter("llama", "all", "gguf")
    vocab_size, prompt = SPECS["llama"].vocab_size, tokens_of("llama", 20)
    theirs = LlamaCpp(path, adapters=[(adapter, 0.8)]).greedy(
        prompt, NUM_NEW, vocab_size=vocab_size, banned=range(3, 259)
    )
    with start_engine(path, lora=(AdapterChoice(adapter, 0.8),), max_outputs=64, **F32_CACHE) as engine:
        logits = engine.logits([*prompt, *theirs.token_ids]).astype(np.float64)[len(prompt) - 1 : -1]
    ours = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.abs(ours - theirs.logprobs).max() < MAX_ERROR * np.abs(logits).max() * 2
