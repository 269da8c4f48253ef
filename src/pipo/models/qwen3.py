"""Qwen 3: queries and keys are normalised head by head. Source: the class `llm_build_qwen3` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.parts import llama_like
from pipo.models.stage import Stage


def qwen3_stages(manifest: Manifest) -> list[Stage]:
    size = manifest.hyper.head_dim
    return llama_like(manifest, attn_q_norm=size, attn_k_norm=size)
