"""Adapters as files: what is read from either form, and what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from pipo.base.adapter import AdapterChoice, choices_of, free_id, parse_choice
from pipo.base.errors import MalformedFile, ModelError, ModelNotFound, UnsupportedModel, UsageError
from pipo.base.manifest import RopeLayout
from pipo.compute import ggml
from pipo.formats.adapter import open_adapter
from pipo.formats.checkpoint import open_checkpoint
from pipo.models.adapters import check_adapter
from pipo.models.registry import stages_of
from pipo.pipeline.type_checks import check_adapter_types
from tests.support.tiny_adapters import ATTENTION, TinyAdapter, write_gguf_adapter, write_peft
from tests.support.tiny_models import SPECS, TinySpec, make_model, write_gguf

PLAIN = TinyAdapter(targets=ATTENTION)
Q = "blk.0.attn_q.weight"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@lru_cache
def model_of(name: str = "llama") -> PreTrainedModel:
    return make_model(SPECS[name])


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    return write_peft(model_of(), PLAIN, tmp_path / "style")


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def write_small_gguf(path: Path, tensors: dict[str, tuple[int, ...]], **keys: object) -> Path:
    """`tensors` with shapes as numpy has them: slowest dimension first. A key of None is left out."""
    given = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0, **keys}
    writer = GGUFWriter(path, str(given.pop("architecture", "llama")))
    for key, value in given.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PAIR: dict[str, tuple[int, ...]] = {f"{Q}.lora_a": (4, 64), f"{Q}.lora_b": (64, 4)}


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    adapter = TinyAdapter(rank=6, alpha=3.0, rank_pattern={"down_proj": 2})
    there = open_adapter(write_gguf_adapter(model_of(), adapter, tmp_path / "a.gguf"))
    here = open_adapter(write_peft(model_of(), adapter, tmp_path / "a"))
    assert here.name == there.name == "a"
    assert here.architecture is None and there.architecture == "llama"
    assert here.rows is RopeLayout.NEOX and there.rows is RopeLayout.NORMAL
    assert here.rank_text == there.rank_text == "ranks 2 to 6"
    assert {n: (p.a.shape, p.b.shape, p.factor) for n, p in here.parts.items()} == {
        n: (p.a.shape, p.b.shape, p.factor) for n, p in there.parts.items()
    }
    assert here.parts[Q].factor == 0.5 and here.factors == (0.5, 1.5)
    assert here.num_bytes == there.num_bytes == sum(p.num_bytes for p in here.parts.values())


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_the_scale_is_the_users(alpha: float | None, tmp_path: Path) -> None:
    """As in llama.cpp."""
    opened = open_adapter(write_small_gguf(tmp_path / "a.gguf", PAIR, **{"adapter.lora.alpha": alpha}))
    assert opened.factors == (1.0,)


@pytest.mark.parametrize(
    ("tensors", "keys", "what"),
    [
        (PAIR, {"general.type": "model"}, "holds 'model', wanted a LoRA adapter"),
        (PAIR, {"general.type": None}, "holds 'model', wanted a LoRA adapter"),
        (PAIR, {"adapter.type": "ia3"}, "an adapter of type 'ia3'"),
        (PAIR, {"adapter.lora.alpha": float("nan")}, "'adapter.lora.alpha' is nan, wanted a finite number"),
        (PAIR, {"adapter.lora.alpha": float("inf")}, "'adapter.lora.alpha' is inf, wanted a finite number"),
        (PAIR, {"adapter.lora.alpha": "8"}, "'adapter.lora.alpha' is a string, wanted a float"),
        (PAIR, {"adapter.alora.invocation_tokens": [1, 2]}, "begin at a token are not implemented"),
        ({}, {}, "has no tensors"),
        ({f"{Q}.lora_a": (4, 64)}, {}, rf"tensor {Q}.lora_b is missing, {Q}.lora_a is there"),
        ({f"{Q}.lora_b": (64, 4)}, {}, rf"tensor {Q}.lora_a is missing, {Q}.lora_b is there"),
        ({**PAIR, "output_norm.weight": (64,)}, {}, "'output_norm.weight' is neither .lora_a nor .lora_b"),
        (
            {f"{Q}.lora_a": (4, 64), f"{Q}.lora_b": (64, 3)},
            {},
            r"\(64, 4\) and .* \(3, 64\), wanted \(in, rank\)",
        ),
        ({f"{Q}.lora_a": (64,), f"{Q}.lora_b": (64, 4)}, {}, r"shape \(64,\)"),
    ],
)
def test_gguf_that_is_no_adapter(
    tensors: dict[str, tuple[int, ...]], keys: dict[str, object], what: str, tmp_path: Path
) -> None:
    path = write_small_gguf(tmp_path / "a.gguf", tensors, **keys)
    with pytest.raises(ModelError, match=what):
        open_adapter(path)


@pytest.mark.parametrize(
    ("changes", "kind", "what"),
    [
        ({"peft_type": "LOHA"}, UnsupportedModel, "'peft_type' is 'LOHA', wanted 'LORA'"),
        ({"bias": "all"}, UnsupportedModel, "'bias' is 'all': trained biases"),
        ({"use_dora": True}, UnsupportedModel, "'use_dora' is True, which pipo does not implement"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, r"'modules_to_save' is \['lm_head'\]"),
        ({"fan_in_fan_out": True}, UnsupportedModel, "'fan_in_fan_out' is True"),
        ({"lora_bias": True}, UnsupportedModel, "'lora_bias' is True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, UnsupportedModel, "'layer_replication'"),
        ({"use_of_tomorrow": 3}, UnsupportedModel, "'use_of_tomorrow' is 3"),
        ({"init_lora_weights": "pissa"}, UnsupportedModel, "'init_lora_weights' is 'pissa', which changes the model's"),
        ({"r": 0}, MalformedFile, "'r' must be a rank from 1 to 65536, found 0"),
        ({"r": True}, MalformedFile, "'r' must be a rank"),
        ({"r": 8}, MalformedFile, r"lora_A of shape \(4, 64\) .* wanted \(8, in\) and \(out, 8\)"),
        ({"lora_alpha": float("nan")}, MalformedFile, "'lora_alpha' must be a finite number, found nan"),
        ({"lora_alpha": None}, MalformedFile, "'lora_alpha' must be a finite number"),
        ({"rank_pattern": {".*q_proj|(x+x+)+y": 2}}, UnsupportedModel, "'rank_pattern' has the pattern"),
        ({"rank_pattern": {"q_proj": 0}}, MalformedFile, "'rank_pattern.q_proj' must be a rank"),
        ({"rank_pattern": {"q_proj": 2}}, MalformedFile, r"self_attn.q_proj has lora_A of shape \(4, 64\)"),
        ({"alpha_pattern": [1]}, MalformedFile, "'alpha_pattern' must be a table"),
        ({"use_rslora": "yes"}, MalformedFile, "'use_rslora' must be true or false, found 'yes'"),
        ({"target_modules": ["v_proj"]}, MalformedFile, "is of no module among 'target_modules'"),
        ({"target_modules": 5}, MalformedFile, "'target_modules' must be a list of names"),
    ],
)
def test_settings_of_peft(changes: dict[str, object], kind: type[ModelError], what: str, tmp_path: Path) -> None:
    folder = write_peft(model_of(), PLAIN, tmp_path / "style", **changes)
    with pytest.raises(kind, match=what):
        open_adapter(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_of_tomorrow": None, "another": False, "third": [], "fourth": {}},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "k_proj", "v_proj", "layers.0.self_attn.o_proj", "o_proj"]},
        {"init_lora_weights": "gaussian"},
        {"layers_to_transform": [0, 1]},
    ],
)
def test_settings_that_change_nothing(changes: dict[str, object], tmp_path: Path, peft: Path) -> None:
    opened = open_adapter(write_peft(model_of(), PLAIN, tmp_path / "other", **changes))
    assert opened.parts.keys() == open_adapter(peft).parts.keys()


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.lora_A.weight"), "self_attn.q_proj has no lora_A, lora_B is there"),
        (lambda t: t.pop(f"{Q_PROJ}.lora_B.weight"), "self_attn.q_proj has no lora_B, lora_A is there"),
        (
            _rename(f"{Q_PROJ}.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"),
            "embed_tokens.lora_embedding_A' is no lora_A or lora_B of a matrix",
        ),
        (
            _rename(f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_magnitude_vector"),
            "lora_magnitude_vector' is no lora_A or lora_B of a matrix",
        ),
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.zeros((0, 64), np.float32)}), r"lora_A of shape \(0, 64\)"),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.zeros((4, 64), np.int64)}),
            "lora_A.weight is I64, which",
        ),
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.zeros(256, np.float32)}), r"lora_A of shape \(256,\)"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_tensors_of_peft(change: Callable[[dict[str, Any]], None], what: str, peft: Path) -> None:
    change_tensors(peft, change)
    with pytest.raises(ModelError, match=what):
        opened = open_adapter(peft)
        check_adapter(opened, *_model(peft.parent))
        check_adapter_types(ggml.load(), opened)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("lm_head", "lm_head: an adapter of this module is not implemented"),
        ("model.layers.0.mlp.experts.3.gate_proj", "experts.3.gate_proj: adapters of routed experts are not"),
        ("model.layers.0.block_sparse_moe.experts.0.w1", "experts.0.w1: adapters of routed experts are not"),
        ("model.layers.0.mlp.gate", "mlp.gate: an adapter of this module is not implemented"),
        ("model.layers.0.self_attn.rotary", "rotary: an adapter of this module is not implemented"),
    ],
)
def test_modules_that_take_none(module: str, what: str, peft: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for half in "AB":
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = tensors[f"{Q_PROJ}.lora_{half}.weight"]

    config = json.loads((peft / "adapter_config.json").read_text()) | {"target_modules": "all-linear"}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=what):
        open_adapter(change_tensors(peft, change))


def test_files_that_are_not_there(peft: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing.gguf: no such file"):
        open_adapter(tmp_path / "nothing.gguf")
    with pytest.raises(UnsupportedModel, match=r"one file of an adapter.*\n\nhint: name the folder"):
        open_adapter(peft / "adapter_model.safetensors")
    (peft / "adapter_model.safetensors").rename(peft / "adapter_model.bin")
    with pytest.raises(ModelNotFound, match="is a pickle, which pipo never opens"):
        open_adapter(peft)
    (peft / "adapter_config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_config.json: no such file"):
        open_adapter(peft)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not JSON"),
        ("[1]", "is list, wanted a table"),
        ("{" * 9000, "is not JSON"),
        ("\xff", "'peft_type'|JSON"),
    ],
)
def test_a_configuration_that_is_none(text: str, what: str, peft: Path) -> None:
    (peft / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=what):
        open_adapter(peft)


def test_a_configuration_of_gigabytes(peft: Path) -> None:
    with (peft / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 32)
    with pytest.raises(MalformedFile, match=r"has 4.0 GiB, at most 1.0 MiB can be"):
        open_adapter(peft)


def _model(folder: Path, spec: TinySpec = SPECS["llama"]) -> tuple[Any, Any]:
    path = folder / "model.gguf"
    write_gguf(make_model(spec), path)
    manifest = open_checkpoint(path).manifest
    return manifest, stages_of(manifest)


def test_an_adapter_for_another_model(tmp_path: Path) -> None:
    manifest, stages = _model(tmp_path)
    for tensors, keys, kind, what in (
        (PAIR, {"architecture": "qwen2"}, UnsupportedModel, "architecture 'qwen2', tiny llama is of 'llama'"),
        ({"blk.7.attn_q.weight.lora_a": (4, 64), "blk.7.attn_q.weight.lora_b": (64, 4)}, {}, UnsupportedModel,
         "blk.7.attn_q.weight is no tensor of tiny llama"),
        ({f"{Q}.lora_a": (4, 128), f"{Q}.lora_b": (64, 4)}, {}, MalformedFile,
         rf"tensor {Q}.lora_a has shape \(128, 4\), {Q} of the model wants \(64, 4\)"),
        ({f"{Q}.lora_a": (4, 64), f"{Q}.lora_b": (32, 4)}, {}, MalformedFile,
         rf"tensor {Q}.lora_b has shape \(4, 32\), {Q} of the model wants \(4, 64\)"),
        ({"token_embd.weight.lora_a": (4, 64), "token_embd.weight.lora_b": (64, 4)}, {}, UnsupportedModel,
         "token_embd.weight: adapters of embeddings, head"),
        ({"output.weight.lora_a": (4, 64), "output.weight.lora_b": (320, 4)}, {}, UnsupportedModel,
         "output.weight: adapters of embeddings, head"),
    ):  # fmt: skip
        opened = open_adapter(write_small_gguf(tmp_path / "a.gguf", tensors, **keys))
        with pytest.raises(kind, match=what):
            check_adapter(opened, manifest, stages)


def test_routed_experts_take_none(tmp_path: Path) -> None:
    manifest, stages = _model(tmp_path, SPECS["mixtral"])
    for role, what in (("ffn_up_exps", "routed experts are not implemented"), ("ffn_gate_inp", "routers and norms")):
        name = f"blk.0.{role}.weight"
        path = write_small_gguf(tmp_path / "a.gguf", {f"{name}.lora_a": (4, 64), f"{name}.lora_b": (96, 4)})
        with pytest.raises(UnsupportedModel, match=what):
            check_adapter(open_adapter(path), manifest, stages)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("a.gguf:0.5", "a.gguf", 0.5),
        ("a.gguf:-2", "a.gguf", -2.0),
        ("C:\\a.gguf", "C:\\a.gguf", 1.0),
        ("C:\\a.gguf:1e-1", "C:\\a.gguf", 0.1),
        ("folder:with:colons", "folder:with:colons", 1.0),
        (":3", ":3", 1.0),
    ],
)
def test_choices(text: str, path: str, scale: float) -> None:
    assert parse_choice(text) == AdapterChoice(Path(path), scale)
    assert choices_of(text) == choices_of([text]) == (AdapterChoice(Path(path), scale),)


def test_a_file_named_like_a_scale(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert parse_choice(f"{tmp_path}/a:2") == AdapterChoice(tmp_path / "a:2")


def test_choices_of_programs() -> None:
    a, b = AdapterChoice(Path("a")), AdapterChoice(Path("b"), 0.5)
    assert choices_of(Path("a")) == choices_of(("a", 1)) == (a,)
    assert choices_of(["a", ("b", 0.5)]) == choices_of(("a", "b:0.5")) == choices_of((a, b)) == (a, b)
    for wrong in (5, [5], {"a": 1}, [("a", "b")], None):
        with pytest.raises(UsageError, match="lora must be paths"):
            choices_of(wrong)
    for scale in ("nan", "inf", "-inf"):
        with pytest.raises(UsageError, match="is not a finite number"):
            choices_of(f"a:{scale}")
    with pytest.raises(UsageError, match="scale True is not a finite number"):
        choices_of(("a", True))


def test_names_that_are_taken() -> None:
    taken: dict[Any, object] = {}
    for want in ("a", "a-2", "a-3"):
        found = free_id("a", taken)
        assert found == want
        taken[found] = None
