"""What a family's config.json says in common with the others, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pipo.base.manifest import HyperParameters
from pipo.formats.hf_fields import HfFields
from pipo.formats.hf_names import LLAMA, HfNames
from pipo.formats.hf_rope import PLAIN_ROPE, RopeDefaults, RopeWithFactors, read_rope

MAX_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_KINDS = (FULL, SLIDING)


@dataclass(frozen=True, slots=True)
class HfModel:
    """What config.json says of a model: its numbers, how its tensors are called, and vectors that no file holds."""

    hyper: HyperParameters
    names: HfNames
    is_tied: bool  # the head is the embedding table
    vectors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """`architecture` in llama.cpp's words, `class_name` in those of transformers. `finish` takes the fields that only
    this family has.
    """

    architecture: str
    class_name: str
    finish: Callable[[HfFields, HfModel], HfModel]
    names: HfNames = LLAMA
    rope: RopeDefaults = PLAIN_ROPE
    is_tied: bool = False
    head_dim_required: bool = False
    has_local_rope: bool = False  # of layers that slide, which `finish` reads
    activation: tuple[str, str] = ("hidden_act", "silu")

    def read(self, config: HfFields) -> HfModel:
        """Raises UnsupportedModel, MalformedFile."""
        return self.finish(config, _opt(config, self) if self.architecture == "opt" else _decoder(config, self))


def _decoder(config: HfFields, family: Family) -> HfModel:
    """What all families but OPT have in common."""
    hidden_size = config.size("hidden_size")
    num_q_heads = config.size("num_attention_heads")
    head_dim = _head_dim(config, hidden_size, num_q_heads, family)
    context_tokens = config.size("max_position_embeddings")
    config.expect(*family.activation)
    rope = _rope(config, head_dim, context_tokens, family)
    hyper = HyperParameters(
        architecture=family.architecture,
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_layers=config.size("num_hidden_layers", most=MAX_LAYERS),
        num_q_heads=num_q_heads,
        num_kv_heads=_num_kv_heads(config, num_q_heads),
        head_dim=head_dim,
        vocab_size=config.size("vocab_size"),
        context_tokens=context_tokens,
        norm_epsilon=config.number("rms_norm_eps", least=1e-12, most=0.1),
        rope=rope.rope,
    )
    is_tied = config.flag("tie_word_embeddings", family.is_tied)
    return HfModel(hyper, family.names, is_tied, rope.factors)


def _head_dim(config: HfFields, hidden_size: int, num_q_heads: int, family: Family) -> int:
    if "head_dim" in config or family.head_dim_required:
        return config.size("head_dim")
    if hidden_size % num_q_heads:
        raise config.wrong("num_attention_heads", num_q_heads, f"a divisor of the hidden size {hidden_size}")
    return hidden_size // num_q_heads


def _num_kv_heads(config: HfFields, num_q_heads: int) -> int:
    num_kv_heads = config.size("num_key_value_heads", num_q_heads)
    if num_q_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", num_kv_heads, f"a divisor of the {num_q_heads} heads")
    return num_kv_heads


def _rope(config: HfFields, head_dim: int, context_tokens: int, family: Family) -> RopeWithFactors:
    """Of all layers, or of those that do not slide where these have another."""
    table = config.table("rope_parameters")
    if table is None or not any(kind in table for kind in LAYER_KINDS):
        return read_rope(config, head_dim, context_tokens, family.rope)
    full = table.table(FULL) or HfFields(config.path, {})
    if family.has_local_rope:
        table.ignore(SLIDING)
    table.refuse_left_over()
    return read_rope(config, head_dim, context_tokens, family.rope, full)


def _opt(config: HfFields, family: Family) -> HfModel:
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden_size % num_heads:
        raise config.wrong("num_attention_heads", num_heads, f"a divisor of the hidden size {hidden_size}")
    context_tokens, head_dim = config.size("max_position_embeddings"), hidden_size // num_heads
    hyper = HyperParameters(
        architecture=family.architecture,
        hidden_size=hidden_size,
        intermediate_size=config.size("ffn_dim"),
        num_layers=config.size("num_hidden_layers", most=MAX_LAYERS),
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        vocab_size=config.size("vocab_size"),
        context_tokens=context_tokens,
        norm_epsilon=1e-5,  # torch's default, which the class leaves alone
        rope=read_rope(HfFields(config.path, {}), head_dim, context_tokens, family.rope).rope,  # rotates nothing
    )
    config.expect(*family.activation)
    return HfModel(hyper, family.names, config.flag("tie_word_embeddings", family.is_tied))
