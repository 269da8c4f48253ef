"""A Hugging Face folder: which files belong to the model, and the tensors in its shards. Reads headers only.

The index of a sharded model is a stranger's too: what it names must lie in the folder. In a cache of the hub files are
links to `blobs`, beside `snapshots`; no other link out of the folder is followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipo.base.errors import MalformedFile, ModelNotFound, UnsupportedModel
from pipo.base.file_identity import FileIdentity
from pipo.base.manifest import FileIdx
from pipo.formats.gguf_header import read_at
from pipo.formats.json_object import read_object
from pipo.formats.model_file import PICKLES_HINT, folder_hint, open_model_file, refuse_stranger
from pipo.formats.safetensors import Safetensors, StoredTensor, open_safetensors

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
MAX_SHARDS = 4096
MAX_TENSORS = 1 << 17
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = frozenset({"optimizer", "scheduler", "training_args", "rng_state"})  # that a training leaves
_MAX_NAMED = 3  # of many, in an error


@dataclass(frozen=True, slots=True)
class HfWeights:
    """The weights of a folder: `files` with what was found of each, `tensors` by their own names."""

    files: tuple[Path, ...]
    identities: tuple[FileIdentity, ...]
    tensors: Mapping[str, tuple[FileIdx, StoredTensor]]


def folder_of(path: Path) -> Path | None:
    """The folder that `path` names: itself, or that of a file of its model. None for any other file."""
    is_part = path.name in (CONFIG, INDEX) or path.suffix == SUFFIX
    try:
        if path.is_dir():
            return path
        return path.parent if is_part and path.with_name(CONFIG).exists() else None
    except OSError:  # whoever opens the file says what is wrong
        return None


def find_file(folder: Path, name: str) -> Path | None:
    """A file of the folder, None where there is none. Raises MalformedFile for a link that leads out of it,
    ModelNotFound where the system refuses to look.
    """
    path = folder / name
    try:
        if not path.exists():
            return None
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ModelNotFound(f"{path}: cannot be opened: {error}") from error
    if not real.is_relative_to(home) and not any(real.is_relative_to(blobs) for blobs in _blobs_of(folder)):
        raise MalformedFile(
            f"{path}: leads out of the folder, to {real}", hint="put the file itself there, or name its own folder"
        )
    return path


def open_weights(folder: Path, *, header_only: bool = False) -> HfWeights:
    """The headers of all shards. Raises ModelNotFound, UnsupportedModel, MalformedFile, ReadFailed.

    `header_only` takes shards that end before their weights do.
    """
    whole = find_file(folder, WHOLE)
    if whole is not None:
        return _join([open_safetensors(whole, header_only=header_only)])
    index = find_file(folder, INDEX)
    if index is None:
        raise _no_weights(folder)
    shard_of = _read_index(index)
    shards = [open_safetensors(p, header_only=header_only) for p in _shard_paths(folder, index, shard_of)]
    _check_index(index, shard_of, shards)
    return _join(shards)


def _blobs_of(folder: Path) -> Iterator[Path]:
    """Where a hub cache keeps the files that `…/snapshots/REVISION` links to: those of a repository, or of all."""
    for each in (folder.absolute(), folder.resolve()):
        if each.parent.name == "snapshots":
            repository = each.parent.parent
            yield (repository / "blobs").resolve()
            yield (repository.parent / "blobs").resolve()


def _no_weights(folder: Path) -> ModelNotFound | UnsupportedModel:
    pickles = sorted(p for p in folder.glob("*") if p.suffix in _PICKLES and p.stem not in _NO_WEIGHTS and p.is_file())
    for path in pickles:
        with open_model_file(path) as file:
            stranger = refuse_stranger(path, read_at(file, path, 0, min(32, path.stat().st_size)))
        if isinstance(stranger, UnsupportedModel):
            return stranger
    if pickles:
        return UnsupportedModel(f"{folder}: has its weights in {pickles[0].name} only", hint=PICKLES_HINT)
    if any(folder.glob("*.gguf")):
        return UnsupportedModel(f"{folder}: has no safetensors", hint=folder_hint(folder))
    others = some_of(p.name for p in sorted(folder.glob(f"*{SUFFIX}")))
    found = f"; what is there: {others}" if others else ""
    return ModelNotFound(f"{folder}: has neither {WHOLE} nor {INDEX}{found}", hint="download the whole folder")


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, every name a plain one."""
    shard_of = read_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise MalformedFile(f"{index}: has no 'weight_map', wanted the file of each tensor")
    for tensor, name in shard_of.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise MalformedFile(
                f"{index}: puts {tensor!r:.80} into {name!r:.80}, wanted the name of a {SUFFIX} file in its folder"
            )
    if len(set(shard_of.values())) > MAX_SHARDS:
        raise MalformedFile(f"{index}: names {len(set(shard_of.values()))} files, at most {MAX_SHARDS} can be")
    return shard_of


def _is_plain(name: str) -> bool:
    is_name = name.isprintable() and "\\" not in name and Path(name).name == name
    return is_name and name.endswith(SUFFIX) and not name.startswith(".")


def _shard_paths(folder: Path, index: Path, shard_of: Mapping[str, str]) -> list[Path]:
    names = sorted(set(shard_of.values()))
    paths = [find_file(folder, name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise ModelNotFound(
            f"{index}: {len(missing)} of its {len(names)} shards are missing: {some_of(missing)}",
            hint="all shards must lie in the folder: download what is missing",
        )
    return [path for path in paths if path is not None]


def _check_index(index: Path, shard_of: Mapping[str, str], shards: Sequence[Safetensors]) -> None:
    """Every shard holds what the index says, and nothing else."""
    wanted_of: dict[str, set[str]] = {}
    for tensor, name in shard_of.items():
        wanted_of.setdefault(name, set()).add(tensor)
    for shard in shards:
        wanted = wanted_of[shard.path.name]
        lacking, extra = wanted - shard.tensors.keys(), shard.tensors.keys() - wanted
        if lacking:
            detail = f"lacks {some_of(sorted(lacking))}, which {index.name} puts there"
        elif extra:
            detail = f"holds {some_of(sorted(extra))}, which {index.name} does not put there"
        else:
            continue
        raise MalformedFile(f"{shard.path}: {detail}", hint="the shard may be of another model: download it again")


def _join(shards: Sequence[Safetensors]) -> HfWeights:
    tensors: dict[str, tuple[FileIdx, StoredTensor]] = {}
    for idx, shard in enumerate(shards):
        tensors |= {name: (FileIdx(idx), tensor) for name, tensor in shard.tensors.items()}
        if len(tensors) > MAX_TENSORS:
            raise MalformedFile(f"{shard.path}: brings the tensors to {len(tensors)}, at most {MAX_TENSORS} can be")
    return HfWeights(tuple(s.path for s in shards), tuple(s.identity for s in shards), tensors)


def some_of(names: Iterable[str]) -> str:
    """A few of many, for an error."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMED} more" if len(listed) > _MAX_NAMED else ""
    return ", ".join(f"{name:.80}" for name in listed[:_MAX_NAMED]) + more
