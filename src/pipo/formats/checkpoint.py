"""A model file → its Manifest and its metadata. The one place where formats meet; today that is GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import Manifest
from pipo.formats.gguf import Gguf, open_gguf
from pipo.formats.gguf_metadata import GgufMetadata
from pipo.formats.hyper_parameters import read_hyper_parameters

CheckArchitecture = Callable[[str, str], None]  # the file and its architecture; raises where nobody runs it

_MAX_NAME_CHARS = 128
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`manifest` is for the engine; `metadata` for the text side: tokenizer, special tokens, chat template."""

    manifest: Manifest
    metadata: GgufMetadata


def open_checkpoint(
    path: Path, check_architecture: CheckArchitecture = lambda file, name: None, *, header_only: bool = False
) -> Checkpoint:
    """Open a model in place; one shard stands for all. Reads headers only, and maps nothing.

    `check_architecture` knows which families there are, and raises before their keys are read. `header_only`: the
    weights need not be there.
    Raises: ModelNotFound, UnsupportedModel, MalformedFile, ReadFailed.
    """
    gguf = open_gguf(path, header_only=header_only)
    _check_is_model(gguf.metadata, check_architecture)
    hyper, extra = read_hyper_parameters(gguf.metadata, gguf.tensors)
    manifest = Manifest(_name_of(gguf), gguf.files, gguf.identities, hyper, gguf.tensors, extra)
    return Checkpoint(manifest, gguf.metadata)


def _check_is_model(metadata: GgufMetadata, check_architecture: CheckArchitecture) -> None:
    kind = metadata.text("general.type")
    if kind not in (None, "model"):
        hint = (
            "an adapter goes with --lora, the model's own file here"
            if kind == "adapter"
            else "name the model's own file"
        )
        raise UnsupportedModel(f"{metadata.path}: holds {kind!r:.80}, wanted a model", hint=hint)
    architecture = metadata.text("general.architecture")
    if architecture:
        check_architecture(metadata.path.name, architecture)


def _name_of(gguf: Gguf) -> str:
    """What the file calls itself, unless that cannot be printed on a line; else the file's name."""
    name = gguf.metadata.text("general.name")
    if name and name.isprintable() and len(name) <= _MAX_NAME_CHARS:
        return name
    return _SHARD_SUFFIX.sub("", gguf.files[0].stem)
