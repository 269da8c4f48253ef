"""The builds of libggml that pipo can be measured with here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Provider:
    """`folder` holds the shared libraries of the package `name`."""

    name: str
    folder: Path


def importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def providers(native_site: Path | None) -> list[Provider]:
    """Those that are installed, and that of `llama-cpp-python` in a folder of its own."""
    found = [Provider("ggml-python", folder) for folder in _installed("ggml")]
    native = [native_site / "llama_cpp" / "lib"] if native_site else _installed("llama_cpp")
    return found + [Provider("llama-cpp-python", folder) for folder in native]


def _installed(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin is not None else None
    return [folder] if folder is not None and folder.is_dir() else []
