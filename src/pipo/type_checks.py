"""Whether this libggml computes with the types that a model or an adapter has."""

from __future__ import annotations

from collections.abc import Iterable

from pipo.base.adapter import Adapter, NamedAdapter
from pipo.base.config import EngineConfig
from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import TensorSpec
from pipo.compute.ggml import Library
from pipo.model_file import ModelFile
from pipo.pipeline.adapters import specs_of


def check_types(lib: Library, model: ModelFile) -> None:
    """Raises UnsupportedModel where this libggml has no products with a type of the model's."""
    _check_types(lib, model.manifest.name, model.manifest.tensors.values())


def check_adapter_types(lib: Library, adapter: Adapter) -> None:
    """The same for an adapter."""
    _check_types(lib, str(adapter.path), specs_of(adapter))


def open_adapters(lib: Library, model: ModelFile, config: EngineConfig) -> list[NamedAdapter]:
    """Those that the engine begins with. Raises ModelError, UsageError, ReadFailed."""
    opened = model.open_adapters(config.lora)
    for named in opened:
        check_adapter_types(lib, named.adapter)
    return opened


def _check_types(lib: Library, of: str, specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        if not lib.multiplies(spec.type):
            raise UnsupportedModel(
                f"{of}: {spec.name} is {spec.type.name}, which libggml {lib.version_text} does not compute",
                hint=None if lib.computes(spec.type) else "pip install 'pipo[native]' brings a newer libggml",
            )
