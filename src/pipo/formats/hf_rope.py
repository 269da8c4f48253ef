"""Rotary embedding as config.json describes it → Rope, and the divisors of frequencies that the file has no tensor for.

Source: transformers' `modeling_rope_utils.py`. Files of its version 5 have `rope_parameters`; older ones `rope_theta`
and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import log, pi, sqrt

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Rope, RopeLayout, RopeScaling
from pipo.formats.hf_fields import HfFields

ROPE_FREQS, ROPE_SHORT, ROPE_LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ORIGINAL_TOKENS = "original_max_position_embeddings"
_MOST_BASE, _MOST_FACTOR = 1e12, 1e6


@dataclass(frozen=True, slots=True)
class RopeWithFactors:
    """`factors` are vectors of the model that no file holds, by name."""

    rope: Rope
    factors: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What the model's class says where the file does not."""

    theta: float = 10_000.0
    is_partial: bool = False  # the family can rotate a part of each head
    original_tokens: int = 0  # if not 0, of a field beside the table, which goes before the table's (Phi)


PLAIN_ROPE = RopeDefaults()


def read_rope(
    config: HfFields, head_dim: int, context_tokens: int, defaults: RopeDefaults, table: HfFields | None = None
) -> RopeWithFactors:
    """`table` are the parameters where there are several, of kinds of layers."""
    theta = config.number("rope_theta", defaults.theta, least=1.0, most=_MOST_BASE)
    share = config.number("partial_rotary_factor", 1.0, least=0.0, most=1.0)
    config.get("rope_parameters")
    table = table or config.table("rope_scaling") or config.table("rope_parameters") or HfFields(config.path, {})
    theta = table.number("rope_theta", theta, least=1.0, most=_MOST_BASE)
    share = table.number("partial_rotary_factor", share, least=0.0, most=1.0)
    if defaults.original_tokens:
        config.ignore(ORIGINAL_TOKENS)
    if theta == 1.0:
        raise config.wrong("rope_theta", theta, "more than 1")
    num_dims = _num_dims(config, head_dim, share, defaults)
    plain = Rope(num_dims, theta, RopeLayout.NEOX, ext_factor=0.0, original_context_tokens=context_tokens)
    found = _scaled(config, table, plain, defaults)
    table.refuse_left_over()
    return found


def _num_dims(config: HfFields, head_dim: int, share: float, defaults: RopeDefaults) -> int:
    if share != 1.0 and not defaults.is_partial:
        raise UnsupportedModel(f"{config.path}: field 'partial_rotary_factor' is {share:g}, its family rotates all")
    num_dims = int(head_dim * share)
    if num_dims % 2 or not num_dims:
        raise config.wrong("partial_rotary_factor", share, f"an even part of the head's {head_dim}")
    return num_dims


def _scaled(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> RopeWithFactors:
    kind = table.text("rope_type", table.text("type", "default"))
    table.ignore("type")
    if defaults.original_tokens:
        kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
    scale = _SCALINGS.get(kind)
    if scale is None:
        raise UnsupportedModel(
            f"{config.path}: rope type {kind!r:.80} is not implemented", hint=f"known are {', '.join(_SCALINGS)}"
        )
    return scale(config, table, plain, defaults)


def _default(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> RopeWithFactors:
    return RopeWithFactors(plain, {})


def _linear(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> RopeWithFactors:
    factor = _factor(table)
    if factor == 1:
        return RopeWithFactors(plain, {})
    return RopeWithFactors(replace(plain, scaling=RopeScaling.LINEAR, factor=factor), {})


def _yarn(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> RopeWithFactors:
    """ggml's rope multiplies the magnitude by 1 + 0.1 ln(factor), on top of the attn_factor that it is given."""
    table.expect("truncate", True)
    original = _original_tokens(config, table, plain, defaults)
    factor = _factor(table, default=max(plain.original_context_tokens / original, 1.0))
    rope = replace(
        plain,
        scaling=RopeScaling.YARN,
        factor=factor,
        original_context_tokens=original,
        attn_factor=_yarn_magnitude(table, factor) / _magnitude(factor),
        ext_factor=1.0,
        beta_fast=table.number("beta_fast", 32.0, least=0.0, most=_MOST_FACTOR) or 32.0,
        beta_slow=table.number("beta_slow", 1.0, least=0.0, most=_MOST_FACTOR) or 1.0,
    )
    return RopeWithFactors(rope, {})


def _yarn_magnitude(table: HfFields, factor: float) -> float:
    magnitude = table.number_or_none("attention_factor", least=1e-3, most=1e3)
    scale = table.number("mscale", 0.0, least=0.0, most=1e3)
    scale_all = table.number("mscale_all_dim", 0.0, least=0.0, most=1e3)
    if magnitude is not None:
        return magnitude
    return _magnitude(factor, scale) / _magnitude(factor, scale_all) if scale and scale_all else _magnitude(factor)


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * log(factor) + 1.0


def _llama3(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> RopeWithFactors:
    """Short waves stay, long ones are stretched, those between are blended."""
    factor, original = _factor(table), _original_tokens(config, table, plain, defaults)
    low = table.number("low_freq_factor", least=0.0, most=_MOST_FACTOR)
    high = table.number("high_freq_factor", least=0.0, most=_MOST_FACTOR)
    if low >= high:
        raise table.wrong("high_freq_factor", high, f"more than the low_freq_factor {low:g}")
    divisors = []
    for i in range(0, plain.num_dims, 2):
        num_waves = original * plain.base ** (-i / plain.num_dims) / (2 * pi)  # in the original context
        kept = min(max((num_waves - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - kept) / factor + kept))
    rope = replace(plain, scaling=RopeScaling.FREQ_FACTORS, original_context_tokens=original)
    return RopeWithFactors(rope, {ROPE_FREQS: tuple(divisors)})


def _longrope(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> RopeWithFactors:
    original = _original_tokens(config, table, plain, defaults)
    factor = _factor(table, default=max(plain.original_context_tokens / original, 1.0))
    magnitude = sqrt(1 + log(factor) / log(original)) if factor > 1 and original > 1 else 1.0
    rope = replace(
        plain,
        scaling=RopeScaling.LONGROPE,
        original_context_tokens=original,
        attn_factor=table.number("attention_factor", magnitude, least=1e-3, most=1e3),
    )
    count = plain.num_dims // 2
    short, long = (
        table.numbers(name, count, least=1e-6, most=_MOST_FACTOR) for name in ("short_factor", "long_factor")
    )
    return RopeWithFactors(rope, {ROPE_SHORT: short, ROPE_LONG: long})


def _factor(table: HfFields, default: float | None = None) -> float:
    return table.number("factor", default, least=1.0, most=_MOST_FACTOR)


def _original_tokens(config: HfFields, table: HfFields, plain: Rope, defaults: RopeDefaults) -> int:
    in_table = table.size(ORIGINAL_TOKENS, plain.original_context_tokens)
    return config.size(ORIGINAL_TOKENS, defaults.original_tokens) if defaults.original_tokens else in_table


_SCALINGS: Mapping[str, Callable[[HfFields, HfFields, Rope, RopeDefaults], RopeWithFactors]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
