"""How the layers of some architectures differ from a Llama's: which slide, how scores and embeddings are scaled.

Files say some of it; the rest llama.cpp writes into its code, by architecture and number of layers.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from pipo.base.manifest import HyperParameters, Rope, RopeScaling
from pipo.formats.arch_keys import ArchKeys
from pipo.formats.gguf_metadata import ArrayRef

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}  # the last layer of so many sees everything
_DEFAULT_WINDOWS = {"gemma2": 4096}
_ALL_LAYERS_SLIDE = frozenset({"llama", "phi3"})  # where the file names a window
_LOCAL_ROPE_BASE = 10_000.0  # Gemma 3's
_SCALED_BY_HEADS = {"gemma2": 46, "gemma3": 62}  # the 27B's layers: its scores are scaled by hidden size / heads
_SOFTCAPS = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}  # of scores and of logits, where the file does not say
_UNROTATED_PERIOD = 4  # SmolLM 3


def with_layer_kinds(hyper: HyperParameters, keys: ArchKeys) -> HyperParameters:
    """Raises MalformedFile, UnsupportedModel."""
    hyper = _with_sliding(hyper, keys)
    if keys.architecture in _SOFTCAPS:
        hyper = _with_scales(hyper, keys)
    if keys.architecture == "smollm3":
        layers = tuple((i + 1) % _UNROTATED_PERIOD == 0 for i in range(hyper.num_layers))
        hyper = replace(hyper, unrotated_layers=layers)
    return hyper


def _with_sliding(hyper: HyperParameters, keys: ArchKeys) -> HyperParameters:
    architecture, num_layers = keys.architecture, hyper.num_layers
    if architecture not in _PERIODS and architecture not in _ALL_LAYERS_SLIDE:
        return hyper
    window = keys.count(WINDOW) or _DEFAULT_WINDOWS.get(architecture, 0)
    layers = _pattern(keys, num_layers)
    if layers is None:
        period = _PERIODS.get(architecture, num_layers + 1)
        layers = tuple(i % period < period - 1 for i in range(num_layers))
    if not 0 < window < hyper.context_tokens:
        return hyper
    local = _local_rope(hyper.rope, keys)
    return replace(hyper, sliding_window=window, sliding_layers=layers, local_rope=local)


def _pattern(keys: ArchKeys, num_layers: int) -> tuple[bool, ...] | None:
    """One flag for each layer, or after how many layers one sees everything (0: none does)."""
    found = keys.take(PATTERN)
    if found is None:
        return None
    if not isinstance(found, ArrayRef):
        period = keys.count(PATTERN, most=num_layers) or num_layers + 1
        return tuple(i % period < period - 1 for i in range(num_layers))
    if found.count != num_layers:
        raise keys.wrong(PATTERN, f"an array of {found.count}", f"a flag for each of {num_layers} layers")
    return tuple(bool(flag) for flag in keys.metadata.array(keys.full(PATTERN)).tolist())


def _local_rope(rope: Rope, keys: ArchKeys) -> Rope | None:
    default = _LOCAL_ROPE_BASE if keys.architecture == "gemma3" else rope.base
    base = keys.number("rope.freq_base_swa", default, least=1.0, most=1e12)
    if keys.architecture == "gemma3":
        return replace(rope, base=base, scaling=RopeScaling.NONE, factor=1.0)
    return None if base == rope.base else replace(rope, base=base)


def _with_scales(hyper: HyperParameters, keys: ArchKeys) -> HyperParameters:
    attention_softcap, final_softcap = _SOFTCAPS[keys.architecture]
    by_heads = hyper.num_layers == _SCALED_BY_HEADS[keys.architecture]
    return replace(
        hyper,
        attention_scale=sqrt(hyper.num_q_heads / hyper.hidden_size) if by_heads else None,
        attention_softcap=keys.number("attn_logit_softcapping", attention_softcap, least=0.0, most=1e6),
        final_softcap=keys.number("final_logit_softcapping", final_softcap, least=0.0, most=1e6),
        embedding_scale=sqrt(hyper.hidden_size),
    )
