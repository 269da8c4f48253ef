"""Which family runs which architecture. Adding a family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Manifest
from pipo.models.gemma import gemma2_stages, gemma3_stages
from pipo.models.gpt_oss import gpt_oss_stages
from pipo.models.llama import llama_stages
from pipo.models.olmoe import olmoe_stages
from pipo.models.opt import opt_stages
from pipo.models.phi3 import phi3_stages
from pipo.models.qwen2 import qwen2_stages
from pipo.models.qwen2moe import qwen2moe_stages
from pipo.models.qwen3 import qwen3_stages
from pipo.models.qwen3moe import qwen3moe_stages
from pipo.models.smollm3 import smollm3_stages
from pipo.models.stage import Stage

FAMILIES: dict[str, Callable[[Manifest], list[Stage]]] = {
    "gemma2": gemma2_stages,
    "gemma3": gemma3_stages,
    "gpt-oss": gpt_oss_stages,
    "llama": llama_stages,
    "olmoe": olmoe_stages,
    "opt": opt_stages,
    "phi3": phi3_stages,
    "qwen2": qwen2_stages,
    "qwen2moe": qwen2moe_stages,
    "qwen3": qwen3_stages,
    "qwen3moe": qwen3moe_stages,
    "smollm3": smollm3_stages,
}


def check_architecture(model: str, architecture: str) -> None:
    """Raises UnsupportedModel for an architecture of no family, naming those there are."""
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"{model}: architecture {architecture!r:.80} is not implemented",
            hint=f"pipo runs: {', '.join(sorted(FAMILIES))}",
        )


def stages_of(manifest: Manifest) -> list[Stage]:
    """The model as a flat list of stages. Raises UnsupportedModel, MalformedFile."""
    check_architecture(manifest.name, manifest.hyper.architecture)
    return FAMILIES[manifest.hyper.architecture](manifest)
