"""An adapter's file or folder → its Adapter: GGUF as llama.cpp's converter writes it, or a folder of PEFT's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipo.base.adapter import Adapter, LowRank, low_rank
from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.manifest import TensorSpec
from pipo.formats.gguf import Gguf, open_gguf
from pipo.formats.gguf_metadata import GgufMetadata
from pipo.formats.hyper_parameters import rope_layout
from pipo.formats.model_file import is_there
from pipo.formats.peft import CONFIG_NAME, WEIGHTS_NAME, open_peft

_ALPHA_KEY, _TYPE_KEY = "adapter.lora.alpha", "adapter.type"
_A, _B = ".lora_a", ".lora_b"


def open_adapter(path: Path) -> Adapter:
    """Reads headers only. What a model makes of the adapter is not known here.

    Raises ModelNotFound, UnsupportedModel, MalformedFile, ReadFailed.
    """
    if is_there(path.is_dir):
        return open_peft(path)
    if path.name in (CONFIG_NAME, WEIGHTS_NAME):
        raise UnsupportedModel(f"{path}: is one file of an adapter", hint=f"name the folder {path.parent}")
    return _from_gguf(path, open_gguf(path))


def _from_gguf(path: Path, gguf: Gguf) -> Adapter:
    """Source: `llama_adapter_lora_init_impl` of llama.cpp."""
    architecture = _check_is_lora(path, gguf.metadata)
    if len(gguf.files) > 1:
        raise UnsupportedModel(f"{path}: is an adapter in {len(gguf.files)} shards, wanted one file")
    alpha = gguf.metadata.number(_ALPHA_KEY) or 0.0
    if not math.isfinite(alpha):
        raise MalformedFile(f"{path}: key {_ALPHA_KEY!r} is {alpha}, wanted a finite number")
    return Adapter(
        path=path,
        name=path.stem,
        file=path,
        identity=gguf.identities[0],
        architecture=architecture,
        rows=rope_layout(architecture),
        parts=_parts(path, gguf.tensors, alpha),
    )


def _check_is_lora(path: Path, metadata: GgufMetadata) -> str:
    """The architecture it is for."""
    kind, what = metadata.text("general.type"), metadata.text(_TYPE_KEY)
    if kind != "adapter" or what != "lora":
        found = f"{kind or 'model'!r:.80}" if kind != "adapter" else f"an adapter of type {what!r:.80}"
        raise UnsupportedModel(f"{path}: holds {found}, wanted a LoRA adapter", hint="a model goes where MODEL stands")
    for key in metadata:
        if key.startswith("adapter.") and ("alora" in key or "invocation" in key):
            raise UnsupportedModel(f"{path}: key {key!r:.80}: adapters that begin at a token are not implemented")
    architecture = metadata.text("general.architecture")
    if not architecture:
        raise MalformedFile(f"{path}: key 'general.architecture' is missing, wanted the family of the adapter's model")
    return architecture


def _parts(path: Path, tensors: Mapping[str, TensorSpec], alpha: float) -> dict[str, LowRank]:
    """An alpha of 0 says that the scale is the user's alone, as in llama.cpp."""
    for name in tensors:
        if not name.endswith((_A, _B)):
            raise UnsupportedModel(f"{path}: tensor {name!r:.80} is neither {_A} nor {_B} of a matrix")
    names = dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in tensors)
    if not names:
        raise MalformedFile(f"{path}: has no tensors, wanted pairs of {_A} and {_B}")
    return {name: _pair(path, name, tensors, alpha) for name in names}


def _pair(path: Path, name: str, tensors: Mapping[str, TensorSpec], alpha: float) -> LowRank:
    a, b = (tensors.get(f"{name}{suffix}") for suffix in (_A, _B))
    if a is None or b is None:
        there, missing = (_A, _B) if b is None else (_B, _A)
        raise MalformedFile(f"{path}: tensor {name}{missing} is missing, {name}{there} is there")
    return low_rank(path, a, b, alpha / a.shape[-1] if alpha else 1.0)
