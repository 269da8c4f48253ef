"""Qwen 2 and 2.5: a Llama with biases of queries, keys and values. Source: the class `llm_build_qwen2` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.parts import llama_like
from pipo.models.stage import Stage


def qwen2_stages(manifest: Manifest) -> list[Stage]:
    return llama_like(manifest)
