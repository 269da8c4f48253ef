"""Random LoRA adapters for the tiny checkpoints, in both forms; the truth is the model with them merged by hand."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as GgufType
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from tests.support.tiny_models import PERMUTED, architecture_of, gguf_name, pair_neighbours

FloatArray = npt.NDArray[np.float32]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# of every family: OPT and Phi-3 have others than Llama
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2", "qkv_proj", "gate_up_proj")


@dataclass(frozen=True, slots=True)
class TinyAdapter:
    """`targets` are ends of names of linear modules. Patterns are PEFT's: names, with another rank or alpha."""

    rank: int = 4
    alpha: float = 8.0
    targets: Sequence[str] = ALL
    seed: int = 0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: Sequence[int] | None = None  # that have a part; None: all

    def has(self, module: str) -> bool:
        """`model.layers.0.mlp.up_proj`"""
        if module.rpartition(".")[2] not in self.targets or ".experts." in module:
            return False
        return self.layers is None or any(f".layers.{layer}." in module for layer in self.layers)

    def rank_of(self, module: str) -> int:
        return next((rank for end, rank in self.rank_pattern.items() if module.endswith(end)), self.rank)

    def factor_of(self, module: str) -> float:
        alpha = next((alpha for end, alpha in self.alpha_pattern.items() if module.endswith(end)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class Pair:
    """A (rank, in), B (out, rank), as PEFT saves them."""

    a: FloatArray
    b: FloatArray


def rounded_pairs(model: PreTrainedModel, adapter: TinyAdapter, type: GgufType) -> dict[str, Pair]:
    """As `write_gguf_adapter(model, adapter, …, type)` stores them."""
    pairs = make_pairs(model, adapter).items()
    return {module: Pair(*(dequantize(quantize(each, type), type) for each in (p.a, p.b))) for module, p in pairs}


def make_pairs(model: PreTrainedModel, adapter: TinyAdapter) -> dict[str, Pair]:
    """By module. B A is about as large as the weights are: a fault shows."""
    rng = np.random.default_rng(adapter.seed)
    pairs = {}
    for name, weight in sorted(model.state_dict().items()):
        module = name.removesuffix(".weight")
        if name == module or not adapter.has(module):
            continue
        (num_out, num_in), rank = weight.shape, adapter.rank_of(module)
        a = rng.standard_normal((rank, num_in)) / math.sqrt(num_in)
        b = rng.standard_normal((num_out, rank)) / (math.sqrt(rank) * abs(adapter.factor_of(module)))
        pairs[module] = Pair(a.astype(np.float32), b.astype(np.float32))
    return pairs


def merged(model: PreTrainedModel, *parts: tuple[TinyAdapter, float], type: GgufType = GgufType.F32) -> PreTrainedModel:
    """A copy with W + scale * factor * B A in the place of every W, where A and B are stored in a type."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for adapter, scale in parts:
            for module, pair in rounded_pairs(model, adapter, type).items():
                product = pair.b.astype(np.float64) @ pair.a.astype(np.float64) * scale * adapter.factor_of(module)
                changed.get_submodule(module).weight += torch.from_numpy(product.astype(np.float32))
    return changed


def write_peft(model: PreTrainedModel, adapter: TinyAdapter, folder: Path, **changes: object) -> Path:
    """`changes` are other keys of the configuration, or other values."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.05,
        "target_modules": list(adapter.targets),
        "bias": "none",
        "use_rslora": adapter.use_rslora,
        "use_dora": False,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, pair in make_pairs(model, adapter).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def write_gguf_adapter(model: PreTrainedModel, adapter: TinyAdapter, path: Path, type: GgufType = GgufType.F32) -> Path:
    """As llama.cpp's converter writes it: rows of queries and keys in the order that the architecture has in GGUF."""
    assert not adapter.use_rslora and not adapter.alpha_pattern, "the format has one alpha"
    writer = GGUFWriter(path, architecture_of(model))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    for module, pair in make_pairs(model, adapter).items():
        name, b = gguf_name(f"{module}.weight", model.config), pair.b
        if architecture_of(model) in PERMUTED and re.search(r"[qk]_proj$", module):
            num_heads = model.config.num_attention_heads if "q_proj" in module else model.config.num_key_value_heads
            b = pair_neighbours(b, num_heads)
        for half, weight in (("a", pair.a), ("b", b)):
            writer.add_tensor(f"{name}.lora_{half}", quantize(weight, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
