"""Which family runs which architecture. Adding a family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Manifest
from pipo.models.llama import llama_stages
from pipo.models.stage import Stage

FAMILIES: dict[str, Callable[[Manifest], list[Stage]]] = {
    "llama": llama_stages,
}


def stages_of(manifest: Manifest) -> list[Stage]:
    """The model as a flat list of stages. Raises UnsupportedModel for an unknown architecture, naming the known."""
    family = FAMILIES.get(manifest.hyper.architecture)
    if family is None:
        raise UnsupportedModel(
            f"{manifest.name}: architecture {manifest.hyper.architecture!r} is not implemented",
            hint=f"pipo runs: {', '.join(sorted(FAMILIES))}",
        )
    return family(manifest)
