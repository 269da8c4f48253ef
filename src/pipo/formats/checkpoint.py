"""A GGUF file or a Hugging Face folder → its Manifest, and what its text side is made of. Where the formats meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipo.base.errors import ModelNotFound, UnsupportedModel
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import Manifest
from pipo.base.tensor_type import TensorType
from pipo.formats.gguf import Gguf, open_gguf
from pipo.formats.gguf_metadata import GgufMetadata
from pipo.formats.hf_config import read_config
from pipo.formats.hf_folder import CONFIG, SUFFIX, find_file, folder_of, open_weights
from pipo.formats.hf_tensors import HfTensors
from pipo.formats.hf_text import HfText, read_text_side
from pipo.formats.hyper_parameters import read_hyper_parameters
from pipo.formats.model_file import refuse_folder

CheckArchitecture = Callable[[str, str], None]  # the file and its architecture; raises where nobody runs it

_MAX_NAME_CHARS = 128
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`manifest` is for the engine; `metadata` for the text side: tokenizer, special tokens, chat template."""

    manifest: Manifest
    metadata: GgufMetadata | HfText


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a model's weights, and the types of its matrices."""

    files: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]
    matrix_types: tuple[TensorType, ...]


def open_checkpoint(
    path: Path, check_architecture: CheckArchitecture = lambda file, name: None, *, header_only: bool = False
) -> Checkpoint:
    """Open a model in place; one shard stands for all. Reads headers only, and maps nothing.

    `check_architecture` knows which families there are, and raises before their keys are read. `header_only`: the
    weights need not be there.
    Raises: ModelNotFound, UnsupportedModel, MalformedFile, ReadFailed.
    """
    folder = folder_of(path)
    if folder is not None:
        checkpoint = _open_folder(folder, check_architecture, header_only=header_only)
        _check_is_part(path, checkpoint.manifest)
        return checkpoint
    gguf = open_gguf(path, header_only=header_only)
    _check_is_model(gguf.metadata, check_architecture)
    hyper, extra = read_hyper_parameters(gguf.metadata, gguf.tensors)
    manifest = Manifest(_name_of(gguf), gguf.files, gguf.identities, hyper, gguf.tensors, extra)
    return Checkpoint(manifest, gguf.metadata)


def open_weight_files(path: Path) -> WeightFiles:
    """What is there of any model, one that pipo does not run too. Raises as `open_checkpoint`."""
    folder = folder_of(path)
    if folder is None:
        gguf = open_gguf(path)
        types = dict.fromkeys(spec.type for spec in gguf.tensors.values() if len(spec.shape) == 2)
        return WeightFiles(gguf.files, gguf.identities, tuple(types))
    weights = open_weights(folder)
    stored = dict.fromkeys(tensor.ggml_type for _, tensor in weights.tensors.values() if len(tensor.shape) == 2)
    return WeightFiles(weights.files, weights.identities, tuple(type_ for type_ in stored if type_ is not None))


def _open_folder(folder: Path, check_architecture: CheckArchitecture, *, header_only: bool) -> Checkpoint:
    config = find_file(folder, CONFIG)
    if config is None:
        raise refuse_folder(folder)
    model = read_config(config, check_architecture)
    weights = open_weights(folder, header_only=header_only)
    tensors = HfTensors(folder, weights, model).read()
    manifest = Manifest(_folder_name(folder), weights.files, weights.identities, model.hyper, tensors, {})
    return Checkpoint(manifest, read_text_side(folder, config, model.hyper.vocab_size))


def _check_is_part(path: Path, manifest: Manifest) -> None:
    """A file of weights stands for its folder where it is one of the model's."""
    if path.suffix == SUFFIX and path.name not in {file.name for file in manifest.files}:
        raise ModelNotFound(
            f"{path}: is none of the model's files in {path.parent}", hint=f"name the folder: {path.parent}"
        )


def _folder_name(folder: Path) -> str:
    """That of the folder; in a cache of the hub, that of the model."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


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
