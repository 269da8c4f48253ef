"""Families of experts: every tensor and key of a file is one that is run, or the file is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from pipo.base.errors import ComputeError, MalformedFile, OverBudget, UnsupportedModel, UsageError
from pipo.base.manifest import Manifest
from pipo.formats.checkpoint import open_checkpoint
from pipo.generation.request import SamplingParams
from pipo.models.registry import stages_of
from pipo.models.stage import StageKind
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.gguf_bytes import GgufBytes, count_key, llama_keys, write
from tests.support.tiny_models import MIXTURES, SPECS, make_model, write_gguf


@pytest.fixture(scope="module", params=MIXTURES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / f"{request.param}.gguf"
    write_gguf(make_model(SPECS[request.param]), path)
    return path


@pytest.fixture(scope="module")
def manifest(path: Path) -> Manifest:
    return open_checkpoint(path).manifest


def without(manifest: Manifest, name: str) -> Manifest:
    return replace(manifest, tensors={key: spec for key, spec in manifest.tensors.items() if key != name})


def with_shape(manifest: Manifest, name: str, shape: tuple[int, ...]) -> Manifest:
    spec = replace(manifest.tensors[name], shape=shape)
    return replace(manifest, tensors={**manifest.tensors, name: spec})


def test_each_block_routes_between_attention_and_experts(manifest: Manifest) -> None:
    stages = [stage for stage in stages_of(manifest) if stage.block_idx == 0]
    kinds = [stage.kind for stage in stages]
    shared = [StageKind.MLP] if manifest.hyper.architecture == "qwen2moe" else []
    assert kinds == [StageKind.ATTENTION, StageKind.EXPERTS, *shared]
    bank = stages[1].bank
    assert bank is not None and bank.num_experts == manifest.hyper.num_experts
    assert stages[0].vectors["next_ffn_gate_inp.weight"].name == "blk.1.ffn_gate_inp.weight"
    last = [stage for stage in stages_of(manifest) if stage.kind is StageKind.ATTENTION][-1]
    assert "next_ffn_gate_inp.weight" not in last.vectors


@pytest.mark.parametrize("part", ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_a_missing_tensor_is_named(manifest: Manifest, part: str) -> None:
    with pytest.raises(MalformedFile, match=rf"tensor blk\.1\.{part}\.weight is missing; wanted shape"):
        stages_of(without(manifest, f"blk.1.{part}.weight"))


def test_a_tensor_for_each_expert_is_an_old_file(manifest: Manifest) -> None:
    old = without(manifest, "blk.0.ffn_up_exps.weight")
    one = replace(manifest.tensors["blk.0.ffn_up_exps.weight"], name="blk.0.ffn_up.0.weight")
    with pytest.raises(UnsupportedModel, match=r"a tensor for each expert \(blk\.0\.ffn_up\.0\.weight\)") as caught:
        stages_of(replace(old, tensors={**old.tensors, one.name: one}))
    assert "convert" in str(caught.value.hint)


@pytest.mark.parametrize("part", ["ffn_gate_exps", "ffn_down_exps"])
def test_a_count_that_disagrees_with_the_tensors_is_refused(manifest: Manifest, part: str) -> None:
    name = f"blk.0.{part}.weight"
    *size, num = manifest.tensors[name].shape
    with pytest.raises(MalformedFile, match=rf"tensor {name} has shape .*{num - 1}\), wanted .*{num}\)"):
        stages_of(with_shape(manifest, name, (*size, num - 1)))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"expert_count": 8}, "'llama.expert_used_count' is 0, wanted a count from 1 to the 8 there are"),
        ({"expert_count": 8, "expert_used_count": 9}, "'llama.expert_used_count' is 9, wanted a count from 1 to the 8"),
        ({"expert_used_count": 2}, "'llama.expert_used_count' is 2, wanted 0, as there are no experts"),
        ({"expert_count": 1 << 20}, "'llama.expert_count' is 1048576, wanted a count from 0 to 4096"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, keys: dict[str, int], says: str) -> None:
    counts = {name: count_key(f"llama.{name}", count) for name, count in keys.items()}
    with pytest.raises(MalformedFile, match=says):
        open_checkpoint(write(tmp_path, bytes(GgufBytes([*llama_keys(), *counts.values()]))))


def test_a_mixture_without_experts_is_refused(manifest: Manifest) -> None:
    if manifest.hyper.architecture == "llama":
        pytest.skip("a Llama may be dense")
    dense = replace(manifest, hyper=replace(manifest.hyper, num_experts=0, num_experts_per_tok=0))
    with pytest.raises(MalformedFile, match="expert_count' is missing or 0, wanted the experts of a block"):
        stages_of(dense)


def test_a_key_nobody_knows_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UnsupportedModel, match="expert_group_count' = 4 asks for something"):
        stages_of(replace(manifest, extra={"expert_group_count": 4}))


def test_a_budget_below_the_experts_of_a_block_names_the_smallest(path: Path) -> None:
    with pytest.raises(OverBudget, match="expert slots") as caught:
        start_engine(path, ram_bytes=1 << 20)
    assert caught.value.smallest_bytes is not None and "the smallest --ram that works" in str(caught.value.hint)
    smallest = smallest_ram_bytes(path)  # with the tests' own drive, whose buffers are smaller
    with pytest.raises(OverBudget):
        start_engine(path, ram_bytes=smallest - 1)
    with start_engine(path, ram_bytes=smallest) as engine:
        assert engine.plan is not None
        (slots,) = engine.plan.placement.expert_slots
        assert slots.num_slots >= engine.model.manifest.hyper.num_experts_per_tok
        assert sum(engine.ledger_breakdown.values()) <= smallest


def poison(path: Path, target: Path, name: str) -> Path:
    """The same file with a NaN in a tensor."""
    data = bytearray(path.read_bytes())
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32(np.nan).tobytes()
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_a_router_that_gives_no_numbers_ends_the_answer_with_its_name(
    path: Path, tmp_path: Path, num_tokens: int
) -> None:
    bad = poison(path, tmp_path / "bad.gguf", "blk.1.ffn_gate_inp.weight")
    with start_engine(bad) as engine:
        for _ in range(2):  # what was cut short does not break what comes after
            with pytest.raises(ComputeError, match=r"the router of (block 1|the next block) gave scores that are not"):
                engine.complete(range(3, 3 + num_tokens), SamplingParams(max_tokens=2))


def test_more_experts_a_token_than_a_group_holds(tmp_path: Path) -> None:
    """One token at a time, so that no larger graph makes room for a group of nine."""
    spec = replace(SPECS["qwen3moe"], num_experts=24, num_experts_per_tok=10)
    write_gguf(make_model(spec), tmp_path / "many.gguf")
    prompt, params = list(range(3, 30)), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with start_engine(tmp_path / "many.gguf", prefill_chunk=1) as engine:
        want = [token.token_id for token in engine.complete(prompt, params).tokens]
    smallest = smallest_ram_bytes(tmp_path / "many.gguf", prefill_chunk=1)
    for ram_bytes in (smallest, smallest + (300 << 10)):
        with start_engine(tmp_path / "many.gguf", prefill_chunk=1, ram_bytes=ram_bytes) as engine:
            assert [token.token_id for token in engine.complete(prompt, params).tokens] == want


@pytest.mark.parametrize("settings", [{"vram": "1GB"}, {"device": "Vulkan0"}])
def test_a_device_is_refused(path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        start_engine(path, **settings)


def test_interrupted_passes_leave_a_cache_that_serves(path: Path) -> None:
    """Left early, again and again, the engine answers as one that was never disturbed."""
    prompt, params = list(range(3, 60)), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    smallest = smallest_ram_bytes(path)
    with start_engine(path, ram_bytes=smallest) as fresh:
        want = [token.token_id for token in fresh.complete(prompt, params).tokens]
    with start_engine(path, ram_bytes=smallest) as engine:
        for i in range(3):
            stream = engine.stream([7 + i, *prompt], params)
            next(stream)
            stream.close()
        assert [token.token_id for token in engine.complete(prompt, params).tokens] == want
