"""Whether a libggml computes with the types of a model."""

from __future__ import annotations

from collections.abc import Iterable

from pipo.base.adapter import Adapter
from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Manifest, TensorSpec
from pipo.compute.ggml import Library
from pipo.pipeline.adapters import specs_of


def check_types(lib: Library, manifest: Manifest) -> None:
    """Raises UnsupportedModel where this libggml has no products with a type of the model's."""
    _check(lib, manifest.name, manifest.tensors.values())


def check_adapter_types(lib: Library, adapter: Adapter) -> None:
    """The same for an adapter."""
    _check(lib, str(adapter.path), specs_of(adapter))


def _check(lib: Library, of: str, specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        if not lib.multiplies(spec.type):
            raise UnsupportedModel(
                f"{of}: {spec.name} is {spec.type.name}, which libggml {lib.version_text} does not compute",
                hint=None if lib.computes(spec.type) else "pip install 'pipo[native]' brings a newer libggml",
            )
