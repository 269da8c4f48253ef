"""models.llama: every tensor and key of a file is one that is run, or the file is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Extent, FileIdx, Manifest, RopeScaling, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.formats.checkpoint import open_checkpoint
from pipo.models.registry import stages_of
from pipo.models.stage import StageKind
from tests.support.gguf_bytes import GgufBytes, llama_keys, write

HIDDEN, MLP, HEAD, HEADS, KV_HEADS, VOCAB = 64, 96, 16, 4, 2, 4  # as llama_keys says
SHAPES = {
    "token_embd.weight": (HIDDEN, VOCAB),
    "output_norm.weight": (HIDDEN,),
    "rope_freqs.weight": (HEAD // 2,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HEADS * HEAD),
    "blk.0.attn_k.weight": (HIDDEN, KV_HEADS * HEAD),
    "blk.0.attn_v.weight": (HIDDEN, KV_HEADS * HEAD),
    "blk.0.attn_output.weight": (HEADS * HEAD, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (HIDDEN, MLP),
    "blk.0.ffn_up.weight": (HIDDEN, MLP),
    "blk.0.ffn_down.weight": (MLP, HIDDEN),
}


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    """One block with frequency factors."""
    header = open_checkpoint(write(tmp_path, bytes(GgufBytes(llama_keys())))).manifest
    rope = replace(header.hyper.rope, scaling=RopeScaling.FREQ_FACTORS)
    return replace(header, hyper=replace(header.hyper, num_layers=1, rope=rope), tensors=tensors_of(SHAPES))


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(n, TensorType.F32, shape, Extent(FileIdx(0), 0, 4)) for n, shape in shapes.items()}


def test_frequency_factors_belong_to_every_attention_stage(small: Manifest) -> None:
    stages = stages_of(small)
    assert [stage.kind for stage in stages] == [
        StageKind.ATTENTION,
        StageKind.MLP,
        StageKind.FINAL_NORM,
        StageKind.HEAD,
    ]
    assert stages[0].vectors["rope_freqs.weight"].name == "rope_freqs.weight"


def test_frequency_factors_of_a_block_are_no_tensor_of_llama_cpp(small: Manifest) -> None:
    tensors = tensors_of({**SHAPES, "blk.0.rope_freqs.weight": (HEAD // 2,)})
    with pytest.raises(UnsupportedModel, match=r"'blk\.0\.rope_freqs\.weight'"):
        stages_of(replace(small, tensors=tensors))


@pytest.mark.parametrize(("key", "value"), [("logit_scale", 8), ("attention.key_length_mla", 64), ("new", None)])
def test_a_key_that_would_change_the_answer_is_refused(small: Manifest, key: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=f"key 'llama.{key}' = {value} asks for something"):
        stages_of(replace(small, extra={key: value}))


def test_a_key_that_says_what_is_done_anyway_is_taken(small: Manifest) -> None:
    assert stages_of(replace(small, extra={"logit_scale": 1.0, "attention.causal": True}))
