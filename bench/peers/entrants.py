"""Who takes part, what each one is given, and where it lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipo.base.units import MIB

TORCH = "torch==2.13.0"  # where a package index offers a build for the CPU alone, ask pip for that one
TRANSFORMERS = ("transformers==5.24.0", "accelerate==1.15.0")
# What torch, transformers and one layer on its way take beside the weights. Measured in a limit of 1155 MB with a 1.1B
# in BF16: accelerate told to keep 400 MB needs 1.2 s a token, told to keep 600 MB 2.2 s.
TORCH_BYTES = 700 * MIB


@dataclass(frozen=True, slots=True)
class Entrant:
    """`kind` of child; `mode` of llama.cpp, or "" for an engine that reads a Hugging Face folder.

    `packages` make its environment; `uses_cache`: what it reads stays in the page cache, so that no other may
    read that file.
    """

    title: str
    kind: str
    packages: tuple[str, ...]
    mode: str = ""
    uses_cache: bool = False
    footnote: str = ""


_XLLAMACPP = ("xllamacpp==2026.10.11549",)
ENTRANTS: Mapping[str, Entrant] = {
    "mapped": Entrant("llama.cpp mapped", "xllamacpp", _XLLAMACPP, "mapped", True, "mmap, no repacking"),
    "direct": Entrant(
        "llama.cpp direct", "xllamacpp", _XLLAMACPP, "direct", footnote="direct I/O while it starts, then all in memory"
    ),
    "default": Entrant("llama.cpp default", "xllamacpp", _XLLAMACPP, "default", True, "as the wheel comes"),
    "native": Entrant(
        "llama.cpp native",
        "llama-cpp-python",
        ("llama-cpp-python==0.3.36", "numpy"),
        "mapped",
        True,
        "compiled for this machine; mmap without repacking where the model does not fit, else its defaults",
    ),
    "accelerate": Entrant(
        "accelerate",
        "accelerate",
        (TORCH, *TRANSFORMERS),
        footnote=f"disk offload of transformers; keeps the budget less {TORCH_BYTES // MIB} MiB",
    ),
    "airllm": Entrant(
        "AirLLM",
        "airllm",
        (TORCH, *TRANSFORMERS, "airllm==4.0.0"),
        footnote="keeps no weights, whatever the budget, and collects garbage after every layer: see its note",
    ),
    "neurostream": Entrant("neurostream", "neurostream", (TORCH, "neurostream==0.2.1"), footnote="block streaming"),
}
OF_GGUF = ("mapped", "direct", "default", "native", "neurostream")
OF_FOLDER = ("accelerate", "airllm", "neurostream")
