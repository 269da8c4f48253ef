"""Phi-3 and Phi-4: fused projections, rotary factors by the context. Source: the class `llm_build_phi3` of llama.cpp.

Where the file names a sliding window all layers slide, as in transformers; llama.cpp ignores it.
"""

from __future__ import annotations

from pipo.base.manifest import Manifest
from pipo.models.checks import TensorBook
from pipo.models.parts import HARMLESS_KEYS, attention, decoder, fused_mlp
from pipo.models.stage import Stage


def phi3_stages(manifest: Manifest) -> list[Stage]:
    h = manifest.hyper

    def block(book: TensorBook, i: int) -> list[Stage]:
        return [attention(book, h, i), fused_mlp(book, h, i)]

    return decoder(manifest, HARMLESS_KEYS, block)
