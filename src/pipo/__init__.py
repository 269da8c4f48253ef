"""pipo: run language models larger than your memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipo.api import LLM, Engine, PipoError, SamplingParams, load
    from pipo.async_api import AsyncLLM

__all__ = ["LLM", "AsyncLLM", "Engine", "PipoError", "SamplingParams", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the API on first use: `pipo --help` must not load libggml."""
    if name not in __all__:
        raise AttributeError(f"module 'pipo' has no attribute {name!r}")
    if name == "AsyncLLM":
        from pipo.async_api import AsyncLLM

        return AsyncLLM
    from pipo import api

    return getattr(api, name)
