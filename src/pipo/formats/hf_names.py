"""What Hugging Face models call their tensors, in llama.cpp's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d{1,6})\.(\w+)\.weight")
_EXPERT_ROLES = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",  # Mixtral
}
_UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # a table that old files kept beside the weights


@dataclass(frozen=True, slots=True)
class ExpertName:
    """A matrix of one expert: `role` as in `blk.3.ffn_up_exps.weight`."""

    role: str
    expert_idx: int


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """All experts of a block in one tensor: `roles` side by side in each."""

    roles: tuple[str, ...]


Found = str | ExpertName | FusedExperts


@dataclass(frozen=True, slots=True)
class HfNames:
    """`blocks` is what precedes a block's number; `top` and `block` are modules by what they are called.

    `biases` are the roles that have one, in every block or at the top. `norms_add` is what the model adds to the
    weights of norms; the first `skipped_positions` rows of a table of positions are nobody's.
    """

    blocks: str
    top: Mapping[str, str]
    block: Mapping[str, str]
    biases: frozenset[str] = frozenset()
    norms_add: float = 0.0
    skipped_positions: int = 0

    def find(self, name: str) -> Found | None:
        """None for a name that the family has not."""
        if not name.startswith(self.blocks):
            return _joined(self.top, "", name)
        number, _, part = name.removeprefix(self.blocks).partition(".")
        if not number.isdecimal() or not number.isascii() or len(number) > 6:
            return None
        at = f"blk.{int(number)}."
        expert = _EXPERT.fullmatch(part)
        if expert is not None and expert[2] in _EXPERT_ROLES:
            return ExpertName(f"{at}{_EXPERT_ROLES[expert[2]]}.weight", int(expert[1]))
        if part in _FUSED:
            return FusedExperts(tuple(f"{at}{role}.weight" for role in _FUSED[part]))
        return _joined(self.block, at, part)

    def is_unused(self, name: str) -> bool:
        """Whether a tensor is one that no model reads."""
        return _UNUSED.fullmatch(name) is not None


_FUSED = {
    f"{module}.experts.{name}": roles
    for module in ("mlp", "block_sparse_moe")
    for name, roles in (("gate_up_proj", ("ffn_gate_exps", "ffn_up_exps")), ("down_proj", ("ffn_down_exps",)))
}


def _joined(table: Mapping[str, str], at: str, name: str) -> str | None:
    module, _, kind = name.rpartition(".")
    found = table.get(module)
    return f"{at}{found}.{kind}" if found is not None and kind in ("weight", "bias") else None


def with_biases(names: HfNames, *roles: str) -> HfNames:
    return replace(names, biases=names.biases | set(roles))


LLAMA = HfNames(
    blocks="model.layers.",
    top={"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    block={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
        "block_sparse_moe.gate": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
    },
)
GEMMA = replace(
    LLAMA,
    block={
        **LLAMA.block,
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    norms_add=1.0,
)
PHI3 = replace(LLAMA, block={**LLAMA.block, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"})
OPT = HfNames(
    blocks="model.decoder.layers.",
    top={
        "model.decoder.embed_tokens": "token_embd",
        "model.decoder.embed_positions": "position_embd",
        "model.decoder.final_layer_norm": "output_norm",
        "lm_head": "output",
    },
    block={
        "self_attn_layer_norm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn_up",
        "fc2": "ffn_down",
    },
    biases=frozenset(
        {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}
    ),
    skipped_positions=2,
)
