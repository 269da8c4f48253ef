"""HyperParameters → GGUF's keys under llama.cpp's names, read back before anybody relies on them.

llama.cpp writes some of what a config.json says into its code, by architecture: which layers slide, how scores are
scaled. A model that has it otherwise has no GGUF that says so, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose, sqrt

import numpy as np

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import HyperParameters, Manifest, Rope, RopeScaling
from pipo.formats.gguf_metadata import GgufMetadata, Scalar
from pipo.formats.hyper_parameters import read_hyper_parameters

_PRECISION = 1e-6  # of float32, which GGUF has
_NORMALISED_WITH_MEAN = frozenset({"opt"})
_UNROTATED = frozenset({"opt"})
_ALWAYS_SLIDING = frozenset({"gemma2", "gemma3"})  # where a window that is not named is llama.cpp's own
_CAPPED = frozenset({"gemma2"})  # where a cap that is not named is llama.cpp's own
_SCALINGS_BY_NAME = (RopeScaling.LINEAR, RopeScaling.YARN)  # tensors say the others


def hyper_parameter_keys(manifest: Manifest) -> dict[str, Scalar]:
    """Raises UnsupportedModel for what a GGUF of this architecture cannot say."""
    hyper = manifest.hyper
    keys: dict[str, Scalar] = {"general.architecture": hyper.architecture}
    for name, value in (*_sizes(hyper), *_of_layers(hyper), *_of_rope(hyper)):
        keys[f"{hyper.architecture}.{name}"] = float(np.float32(value)) if isinstance(value, float) else value
    metadata = GgufMetadata(manifest.files[0], manifest.identities[0], keys)
    _check_said(manifest, read_hyper_parameters(metadata, manifest.tensors)[0])
    return keys


def _sizes(hyper: HyperParameters) -> Iterator[tuple[str, Scalar]]:
    yield "block_count", hyper.num_layers
    yield "context_length", hyper.context_tokens
    yield "embedding_length", hyper.hidden_size
    yield "feed_forward_length", hyper.intermediate_size
    yield "attention.head_count", hyper.num_q_heads
    yield "attention.head_count_kv", hyper.num_kv_heads
    yield "attention.key_length", hyper.head_dim
    yield "attention.value_length", hyper.head_dim
    yield "vocab_size", hyper.vocab_size
    kind = "layer_norm" if hyper.architecture in _NORMALISED_WITH_MEAN else "layer_norm_rms"
    yield f"attention.{kind}_epsilon", hyper.norm_epsilon
    if hyper.num_experts:
        yield "expert_count", hyper.num_experts
        yield "expert_used_count", hyper.num_experts_per_tok
    if hyper.expert_size:
        yield "expert_feed_forward_length", hyper.expert_size
    if hyper.shared_expert_size:
        yield "expert_shared_feed_forward_length", hyper.shared_expert_size


def _of_layers(hyper: HyperParameters) -> Iterator[tuple[str, Scalar]]:
    if hyper.sliding_window or hyper.architecture in _ALWAYS_SLIDING:
        yield "attention.sliding_window", hyper.sliding_window or hyper.context_tokens
    if hyper.architecture in _CAPPED or hyper.attention_softcap:
        yield "attn_logit_softcapping", hyper.attention_softcap
    if hyper.architecture in _CAPPED or hyper.final_softcap:
        yield "final_logit_softcapping", hyper.final_softcap
    if hyper.local_rope is not None:
        yield "rope.freq_base_swa", hyper.local_rope.base


def _of_rope(hyper: HyperParameters) -> Iterator[tuple[str, Scalar]]:
    rope = hyper.rope
    if hyper.architecture in _UNROTATED:
        return
    yield "rope.dimension_count", rope.num_dims
    yield "rope.freq_base", rope.base
    if rope.scaling in _SCALINGS_BY_NAME:
        yield "rope.scaling.type", rope.scaling.value
        yield "rope.scaling.factor", rope.factor
    if rope.scaling in (RopeScaling.YARN, RopeScaling.LONGROPE):
        yield "rope.scaling.original_context_length", rope.original_context_tokens
    if rope.attn_factor != 1:
        yield "rope.scaling.attn_factor", rope.attn_factor
    if rope.scaling is RopeScaling.YARN:
        yield "rope.scaling.yarn_beta_fast", rope.beta_fast
        yield "rope.scaling.yarn_beta_slow", rope.beta_slow


def _check_said(manifest: Manifest, found: HyperParameters) -> None:
    """What a reader of the keys takes them for is what the model is."""
    wanted = _meaning(manifest.hyper)
    for name, value in _meaning(found).items():
        if not _is_same(value, wanted[name]):
            raise UnsupportedModel(
                f"{manifest.name}: its {name.replace('_', ' ')} is {wanted[name]!s:.80}, which a GGUF of architecture "
                f"{manifest.hyper.architecture} cannot say: its readers would take {value!s:.80}",
                hint="the folder itself runs as it is",
            )


def _meaning(hyper: HyperParameters) -> dict[str, object]:
    """All that is computed with, one name for each; what is not used is None."""
    slides = bool(hyper.sliding_window) and any(hyper.sliding_layers)
    told = {
        name: getattr(hyper, name)
        for name in (
            "architecture", "hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim",
            "vocab_size", "context_tokens", "norm_epsilon", "num_experts", "num_experts_per_tok", "expert_size",
            "shared_expert_size", "attention_softcap", "final_softcap", "embedding_scale",
        )
    }  # fmt: skip
    return {
        **told,
        "sliding_window": hyper.sliding_window if slides else None,
        "sliding_layers": hyper.sliding_layers if slides else None,
        "unrotated_layers": hyper.unrotated_layers if any(hyper.unrotated_layers) else None,
        "attention_scale": 1 / sqrt(hyper.head_dim) if hyper.attention_scale is None else hyper.attention_scale,
        **{f"rope_{name}": value for name, value in _meaning_of_rope(hyper.rope).items()},
        "local_rope": tuple(_meaning_of_rope(hyper.local_rope).values()) if slides and hyper.local_rope else None,
    }


def _meaning_of_rope(rope: Rope) -> dict[str, object]:
    is_yarn = rope.scaling is RopeScaling.YARN
    has_original = is_yarn or rope.scaling is RopeScaling.LONGROPE
    return {
        "num_dims": rope.num_dims,
        "base": rope.base,
        "scaling": rope.scaling.value,
        "factor": rope.factor if rope.scaling in _SCALINGS_BY_NAME else None,
        "original_context_tokens": rope.original_context_tokens if has_original else None,
        "attn_factor": rope.attn_factor,
        "ext_factor": rope.ext_factor,
        "beta_fast": rope.beta_fast if is_yarn else None,
        "beta_slow": rope.beta_slow if is_yarn else None,
    }


def _is_same(found: object, wanted: object) -> bool:
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    if isinstance(found, float) and isinstance(wanted, float):
        return isclose(found, wanted, rel_tol=_PRECISION)
    return found == wanted
