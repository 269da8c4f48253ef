"""The file beside a model that has some of its matrices as one CPU's repacked kernels want them.

A GGUF by form, `MODEL.gguf.native`, with tensors of the same names, types and sizes as the model's, so that a part of
one lies in it where it lies in the model. Its keys say which version of the model it was made of, and for which
kernels: a digest for each type of a sample that they repacked. Nobody else can use it, which `general.type` tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipo.base.errors import MalformedFile, UnsupportedModel
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import Manifest, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.formats.checkpoint import Checkpoint
from pipo.formats.gguf import Gguf, open_gguf
from pipo.formats.gguf_metadata import GgufMetadata
from pipo.formats.model_file import is_there

GENERAL_TYPE = "native layout"
VERSION_KEY, VERSION = "pipo.native.version", 1
SOURCE_KEY, KERNELS_KEY = "pipo.native.source", "pipo.native.kernels"
MADE_BY_KEY = "pipo.native.made_by"
_CHECKSUM_KEY = "pipo.checksum.header"
_SUFFIX = ".native"
_ANEW = "`pipo pack MODEL --layout native --overwrite` makes it anew"


@dataclass(frozen=True, slots=True)
class NativeFile:
    """`kernels` are the digests by the name of a type; `made_by` is libggml and CPU, for people."""

    path: Path
    identity: FileIdentity
    source: str
    kernels: Mapping[str, str]
    made_by: str
    tensors: Mapping[str, TensorSpec]

    def is_for(self, digest: Callable[[TensorType], str]) -> bool:
        """`digest` is that of a type's sample, from the kernels there are."""
        return all(digest(TensorType[name]) == wanted for name, wanted in self.kernels.items())

    def manifest_with(self, manifest: Manifest) -> Manifest:
        """The model's, with this file after its own."""
        files, identities = (*manifest.files, self.path), (*manifest.identities, self.identity)
        return Manifest(manifest.name, files, identities, manifest.hyper, manifest.tensors, manifest.extra)


def native_path(first: Path) -> Path:
    """Where a model has it, if it has one: beside its first file."""
    return first.with_name(first.name + _SUFFIX)


def has_place(checkpoint: Checkpoint) -> bool:
    """Something of pipo's may lie beside the model: not in the cache of the hub, which other programs share; and a
    folder's weights have no repacked kernels.
    """
    is_in_cache = any(parent.name == "snapshots" for parent in checkpoint.manifest.files[0].absolute().parents)
    return isinstance(checkpoint.metadata, GgufMetadata) and not is_in_cache


def source_of(checkpoint: Checkpoint) -> str:
    """What tells this version of a model from another: its checksum where it has one, so that copies are the same; else
    sizes and times of its files.
    """
    metadata = checkpoint.metadata
    checksum = metadata.text(_CHECKSUM_KEY) if isinstance(metadata, GgufMetadata) else None
    if checksum:
        return f"checksum {checksum}"
    return ", ".join(f"{each.num_bytes} bytes of {each.modified_ns}" for each in checkpoint.manifest.identities)


def open_native(manifest: Manifest) -> NativeFile | None:
    """None where there is none. Raises MalformedFile, UnsupportedModel, ReadFailed for one that cannot be used."""
    path = native_path(manifest.files[0])
    if not is_there(path.is_file):
        return None
    gguf = open_gguf(path)
    metadata = gguf.metadata
    if metadata.text("general.type") != GENERAL_TYPE or metadata.integer(VERSION_KEY) != VERSION:
        raise UnsupportedModel(f"{path}: is no file of repacked weights, or of another version of pipo", hint=_ANEW)
    kernels = dict(_pair(path, text) for text in metadata.strings(KERNELS_KEY))
    source, made_by = metadata.text(SOURCE_KEY) or "", metadata.text(MADE_BY_KEY) or ""
    tensors = {name: _checked(gguf, spec, manifest, kernels) for name, spec in gguf.tensors.items()}
    return NativeFile(path, gguf.identities[0], source, kernels, made_by, tensors)


def _pair(path: Path, text: str) -> tuple[str, str]:
    name, _, digest = text.partition(" ")
    if not digest or name not in TensorType.__members__:
        raise MalformedFile(f"{path}: {KERNELS_KEY} has {text!r:.80}, wanted a type and a digest", hint=_ANEW)
    return name, digest


def _checked(gguf: Gguf, spec: TensorSpec, manifest: Manifest, kernels: Mapping[str, str]) -> TensorSpec:
    """As the model has it, but for where its bytes are. The file comes after the model's own."""
    of_model = manifest.tensors.get(spec.name)
    what = f"{gguf.files[0]}: {spec.name} is {spec.type.name} {spec.shape}"
    if of_model is None or (of_model.type, of_model.shape) != (spec.type, spec.shape):
        found = "none" if of_model is None else f"{of_model.type.name} {of_model.shape}"
        raise MalformedFile(f"{what}, the model has {found}", hint=_ANEW)
    if spec.type.name not in kernels:
        raise MalformedFile(f"{what}, for which {KERNELS_KEY} has no digest", hint=_ANEW)
    return spec.repacked_in(len(manifest.files))
