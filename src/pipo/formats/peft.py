"""A folder of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors → its Adapter.

Source: `LoraConfig` of PEFT for what the keys mean, and the names under which it saves tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipo.base.adapter import Adapter, LowRank, low_rank
from pipo.base.errors import MalformedFile, ModelNotFound, UnsupportedModel
from pipo.base.manifest import FileIdx, RopeLayout
from pipo.base.units import MIB
from pipo.formats.json_object import read_object
from pipo.formats.safetensors import Safetensors, StoredTensor, open_safetensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = MIB
MAX_RANK = 1 << 16
MAX_TARGETS = 1 << 12

# llama.cpp's names of the modules of a block
ROLES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.out_proj": "attn_output",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_MODULE = re.compile(r"(?:model\.)*(?:decoder\.)?layers\.(?P<block>\d{1,5})\.(?P<part>.+)")
_LITERAL = re.compile(r"\^?[\w.]+\$?")  # a pattern that is a name

# what a run does not depend on, or what the tensors say themselves
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_version", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
})  # fmt: skip
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
})  # fmt: skip
# ways to begin a training that leave the model's own weights as they are; others change them too
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Scaling:
    """Rank and alpha of a module, of which patterns may name others than the usual ones."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    is_stabilised: bool  # rsLoRA: divides by the square root of the rank

    def rank_of(self, module: str) -> int:
        return self.ranks.get(_match(module, self.ranks), self.rank)

    def factor_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), self.alphas.get(_match(module, self.alphas), self.alpha)
        return alpha / math.sqrt(rank) if self.is_stabilised else alpha / rank


def open_peft(folder: Path) -> Adapter:
    """Raises ModelNotFound, UnsupportedModel, MalformedFile, ReadFailed."""
    config = _read_config(folder / CONFIG_NAME)
    scaling = _scaling(folder / CONFIG_NAME, config)
    path = folder / WEIGHTS_NAME
    if not path.exists():
        is_pickled = (folder / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle, which pipo never opens: save it as safetensors" if is_pickled else None
        raise ModelNotFound(f"{path}: no such file", hint=hint)
    opened = open_safetensors(path)
    parts = _parts(opened, scaling, _target_names(folder / CONFIG_NAME, config))
    name = folder.resolve().name
    return Adapter(folder, name, path, opened.identity, None, RopeLayout.NEOX, parts)


def _read_config(path: Path) -> dict[str, object]:
    found = read_object(path, MAX_CONFIG_BYTES)
    _refuse_unsupported(path, found)
    return found


def _refuse_unsupported(path: Path, config: Mapping[str, object]) -> None:
    """A key that nobody knows may be there where it is off."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"{path}: key 'peft_type' is {config.get('peft_type')!r:.80}, wanted 'LORA'")
    if config.get("bias", "none") != "none":
        raise UnsupportedModel(f"{path}: key 'bias' is {config['bias']!r:.80}: trained biases are not implemented")
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        raise UnsupportedModel(
            f"{path}: key 'init_lora_weights' is {start!r:.80}, which changes the model's own weights",
            hint="PEFT makes a plain adapter of it: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    for key, value in config.items():
        if key not in _HARMLESS and key not in _READ and value not in (None, False, "", 0) and value not in ([], {}):
            raise UnsupportedModel(f"{path}: key {key!r:.80} is {value!r:.80}, which pipo does not implement")


def _scaling(path: Path, config: Mapping[str, object]) -> _Scaling:
    rank = _rank(path, "r", config.get("r"))
    alpha = _alpha(path, "lora_alpha", config.get("lora_alpha"))
    ranks = {key: _rank(path, f"rank_pattern.{key}", value) for key, value in _patterns(path, config, "rank_pattern")}
    alphas = {key: _alpha(path, f"alpha_pattern.{key}", each) for key, each in _patterns(path, config, "alpha_pattern")}
    is_stabilised = config.get("use_rslora") or False
    if not isinstance(is_stabilised, bool):
        _refuse(path, "use_rslora", "true or false", is_stabilised)
    return _Scaling(rank, alpha, ranks, alphas, is_stabilised)


def _rank(path: Path, key: str, found: object) -> int:
    if type(found) is not int or not 1 <= found <= MAX_RANK:
        _refuse(path, key, f"a rank from 1 to {MAX_RANK}", found)
    return found


def _alpha(path: Path, key: str, found: object) -> float:
    if type(found) not in (int, float) or not isinstance(found, int | float) or not abs(found) < 1e30:
        _refuse(path, key, "a finite number", found)
    return float(found)


def _patterns(path: Path, config: Mapping[str, object], key: str) -> list[tuple[str, object]]:
    """PEFT takes regular expressions; those that are names are understood, a stranger's others are not run."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        _refuse(path, key, "a table", found)
    for pattern in found:
        if not _LITERAL.fullmatch(pattern):
            raise UnsupportedModel(
                f"{path}: key {key!r} has the pattern {pattern!r:.80}", hint="pipo understands names of modules there"
            )
    return [(pattern.removesuffix("$"), value) for pattern, value in found.items()]


def _match(module: str, patterns: Mapping[str, object]) -> str:
    """The first that names the module, or its end behind a dot; where none does, the module itself."""
    for pattern in patterns:
        is_whole = module == pattern.removeprefix("^")
        if is_whole or (not pattern.startswith("^") and module.endswith(f".{pattern}")):
            return pattern
    return module


def _target_names(path: Path, config: Mapping[str, object]) -> list[str] | None:
    """None where a pattern, or "all-linear", says which modules have a part: then the tensors do."""
    found = config.get("target_modules")
    if found is None or isinstance(found, str):
        return None
    if not isinstance(found, list) or len(found) > MAX_TARGETS or not all(isinstance(name, str) for name in found):
        _refuse(path, "target_modules", f"a list of at most {MAX_TARGETS} names, or a text", found)
    return found


def _parts(opened: Safetensors, scaling: _Scaling, targets: list[str] | None) -> dict[str, LowRank]:
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in opened.tensors.items():
        module, half = _module_and_half(opened.path, name)
        if targets is not None and _match(module, dict.fromkeys(targets)) == module and module not in targets:
            raise MalformedFile(f"{opened.path}: tensor {name!r:.120} is of no module among 'target_modules'")
        if half in halves.setdefault(module, {}):
            raise MalformedFile(f"{opened.path}: {module} has lora_{half} twice")
        halves[module][half] = tensor
    if not halves:
        raise MalformedFile(f"{opened.path}: has no tensors, wanted pairs of lora_A and lora_B")
    parts: dict[str, LowRank] = {}
    for module, found in halves.items():
        target = _gguf_name(opened.path, module)
        if target in parts:
            raise MalformedFile(f"{opened.path}: two modules are {target}, {module} among them")
        parts[target] = _pair(opened.path, module, found, scaling)
    return parts


def _module_and_half(path: Path, name: str) -> tuple[str, str]:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → `model.layers.0.self_attn.q_proj`, `A`."""
    matched = _TENSOR.fullmatch(name)
    if matched is None:
        raise UnsupportedModel(
            f"{path}: tensor {name!r:.120} is no lora_A or lora_B of a matrix",
            hint="trained embeddings, biases, magnitudes (DoRA) and whole modules are not implemented",
        )
    return matched["module"], matched["half"]


def _gguf_name(path: Path, module: str) -> str:
    matched = _MODULE.fullmatch(module)
    part = matched["part"] if matched else ""
    if ".experts." in f".{part}":
        raise UnsupportedModel(f"{path}: {module}: adapters of routed experts are not implemented")
    if matched is None or part not in ROLES:
        raise UnsupportedModel(
            f"{path}: {module:.120}: an adapter of this module is not implemented",
            hint=f"those of a block's {', '.join(dict.fromkeys(role.split('.')[-1] for role in ROLES))} are",
        )
    return f"blk.{int(matched['block'])}.{ROLES[part]}.weight"


def _pair(path: Path, module: str, found: Mapping[str, StoredTensor], scaling: _Scaling) -> LowRank:
    if found.keys() != {"A", "B"}:
        there = "".join(found)
        missing = "B" if there == "A" else "A"
        raise MalformedFile(f"{path}: {module} has no lora_{missing}, lora_{there} is there")
    shapes = {half: tensor.shape for half, tensor in found.items()}
    rank = scaling.rank_of(module)
    if [len(shape) for shape in shapes.values()] != [2, 2] or shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise MalformedFile(
            f"{path}: {module} has lora_A of shape {shapes['A']} and lora_B of {shapes['B']}, "
            f"wanted ({rank}, in) and (out, {rank}), of the rank that {CONFIG_NAME} says"
        )
    a, b = (found[half].as_spec(path, FileIdx(0)) for half in "AB")
    return low_rank(path, a, b, scaling.factor_of(module))


def _refuse(path: Path, key: str, wanted: str, found: object) -> NoReturn:
    raise MalformedFile(f"{path}: key {key!r:.80} must be {wanted}, found {found!r:.80}")
