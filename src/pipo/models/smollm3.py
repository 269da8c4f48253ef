"""SmolLM 3: a Llama in which every fourth layer has no rotary embedding. Source: `llm_build_smollm3` of llama.cpp."""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.parts import llama_like
from pipo.models.stage import Stage


def smollm3_stages(manifest: Manifest) -> list[Stage]:
    return llama_like(manifest)
