"""Which files of a repository make a model: a GGUF of one quantisation with all its shards, or a set of safetensors.

The same choice for what the hub lists and for what lies in the cache. Opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipo.base.errors import MalformedFile, ModelNotFound, UnsupportedModel
from pipo.base.units import format_size
from pipo.formats.json_object import MAX_FILE_BYTES, MAX_VALUES, parse_object
from pipo.store.hub_name import HubName

DEFAULT_QUANTS = ("Q4_K_M", "Q4_0", "Q4_K_S", "IQ4_XS")  # the first that is there, where none is named
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
MAX_INDEX_BYTES = MAX_FILE_BYTES
MAX_SHARDS = 4096

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_QUANT = re.compile(
    r"(?<![a-z0-9])((?:UD-)?(?:I?Q\d(?:_(?:\d|K|XXS|XS|NL|XXL|XL|S|M|L))*|TQ\d_\d|BF16|FP?16|FP?32|MXFP4|NVFP4))(?![a-z0-9])",
    re.IGNORECASE,
)
_NOT_THE_MODEL = re.compile(r"(?<![a-z])(mmproj|imatrix)(?![a-z])", re.IGNORECASE)  # beside one: images, statistics
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_LISTED = 40


@dataclass(frozen=True, slots=True)
class RepoFile:
    """`path` is relative to the repository, with forward slashes."""

    path: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Variant:
    """One GGUF model of a repository. `stem` is its path without shard number and suffix."""

    stem: str
    label: str
    files: tuple[RepoFile, ...]
    num_shards: int

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def is_complete(self) -> bool:
        return len(self.files) == self.num_shards

    def is_called(self, quant: str) -> bool:
        """Case does not count. A file's path or name, of any shard, is a name too."""
        wanted = quant.casefold()
        names = [self.label, self.stem, PurePosixPath(self.stem).name]
        names += [name for file in self.files for name in (file.path, PurePosixPath(file.path).name)]
        return wanted in (name.casefold() for name in names)

    def has_word(self, quant: str) -> bool:
        word = rf"(?<![a-z0-9]){re.escape(quant)}(?![a-z0-9])"
        return re.search(word, self.stem, re.IGNORECASE) is not None


def variants_of(files: Iterable[RepoFile]) -> list[Variant]:
    """The GGUF models among `files`, smallest first; shards may be missing."""
    groups: dict[tuple[str, int], dict[int, RepoFile]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if path.suffix.lower() != ".gguf" or _NOT_THE_MODEL.search(path.name):
            continue
        shard = _SHARD.fullmatch(path.stem)
        stem, idx, count = (shard[1], int(shard[2]), int(shard[3])) if shard else (path.stem, 1, 1)
        if 1 <= idx <= count <= MAX_SHARDS:
            groups.setdefault((file.path.removesuffix(path.name) + stem, count), {})[idx] = file
    variants = [
        Variant(stem, _label(stem), tuple(shards[idx] for idx in sorted(shards)), count)
        for (stem, count), shards in groups.items()
    ]
    return sorted(variants, key=lambda variant: (variant.num_bytes, variant.stem))


def _label(stem: str) -> str:
    """The quantisation that a name tells, in capitals; else the folder's; else the name itself."""
    path = PurePosixPath(stem)
    for name in (path.name, path.parent.name):
        found = _QUANT.findall(name)
        if found:
            return str(found[-1]).upper()
    return path.name


def choose_variant(variants: Sequence[Variant], name: HubName) -> Variant:
    """The one that is meant. Raises ModelNotFound listing what there is."""
    if name.quant is not None:
        return _only([v for v in variants if v.is_called(name.quant)] or
                     [v for v in variants if v.has_word(name.quant)], variants, name)  # fmt: skip
    for quant in DEFAULT_QUANTS:
        found = [variant for variant in variants if variant.label == quant]
        if found:
            return _only(found, variants, name)
    if len(variants) == 1:
        return variants[0]
    raise ModelNotFound(
        f"{name} has none of {', '.join(DEFAULT_QUANTS)}, which are taken unasked; {listing(variants)}",
        hint=f"name one: {name.repo}:{variants[0].label}" if variants else None,
    )


def _only(found: Sequence[Variant], variants: Sequence[Variant], name: HubName) -> Variant:
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelNotFound(
            f"{name.repo} has no {name.quant!r}; {listing(variants)}",
            hint=f"name one: {name.repo}:{variants[0].label}" if variants else None,
        )
    files = ", ".join(variant.files[0].path for variant in found[:_MAX_LISTED])
    raise ModelNotFound(
        f"{name} may be any of {files}", hint=f"name the file: {name.repo}:{PurePosixPath(found[0].files[0].path).name}"
    )


def listing(variants: Sequence[Variant]) -> str:
    """What there is, with sizes."""
    if not variants:
        return "there is no GGUF file"
    shown = [f"{variant.label} {format_size(variant.num_bytes)}" for variant in variants[:_MAX_LISTED]]
    more = f" and {len(variants) - _MAX_LISTED} more" if len(variants) > _MAX_LISTED else ""
    return f"there are {', '.join(shown)}{more}" if len(variants) > 1 else f"there is {shown[0]}"


def has_safetensors(files: Iterable[RepoFile]) -> bool:
    """Whether there is a set that can be opened: a config, and weights in one file or by an index."""
    paths = {file.path for file in files}
    return CONFIG in paths and bool(paths & {SINGLE, INDEX})


def safetensors_set(files: Sequence[RepoFile], index: bytes | None) -> list[RepoFile]:
    """Config, tokenizer, template, and the weights that `index` names. Never a pickle.

    Raises MalformedFile for an index that is none, ModelNotFound for a shard that is not among `files`.
    """
    by_path = {file.path: file for file in files}
    is_whole = index is None or SINGLE in by_path  # as the reader takes it, an index beside it or not
    weights = [SINGLE] if is_whole else [INDEX, *shard_names(index or b"")]
    missing = [path for path in weights if path not in by_path]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ModelNotFound(f"{INDEX} names weights that are not there: {', '.join(missing[:8])}{more}")
    return [by_path[path] for path in (*SIDE_FILES, *weights) if path in by_path]


def check_index_size(index: RepoFile) -> None:
    """Raises MalformedFile for what is too large to be one."""
    if index.num_bytes > MAX_INDEX_BYTES:
        raise MalformedFile(
            f"{INDEX}: has {format_size(index.num_bytes)}, at most {format_size(MAX_INDEX_BYTES)} can be"
        )


def shard_names(index: bytes) -> list[str]:
    """The files that an index of safetensors names, in order. Raises MalformedFile."""
    try:
        shard_of = parse_object(index, MAX_VALUES)["weight_map"]
        names = sorted(set(shard_of.values())) if isinstance(shard_of, dict) else []
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedFile(f"{INDEX}: has no usable weight_map: {error!r:.200}") from error
    if not names or len(names) > MAX_SHARDS:
        raise MalformedFile(f"{INDEX}: names {len(names)} files, wanted 1 to {MAX_SHARDS}")
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or not is_plain(name) or "/" in name:
            raise MalformedFile(f"{INDEX}: names {name!r:.80}, wanted the name of a .safetensors file beside it")
    return names


def is_plain(path: str) -> bool:
    """A relative path that stays where it is put, whatever the system."""
    parts = path.split("/")
    return path.isprintable() and not set(path) & set('\\:*?"<>|') and all(p not in ("", ".", "..") for p in parts)


def refuse_unusable(name: HubName, files: Sequence[RepoFile]) -> UnsupportedModel:
    """The error for a repository with neither GGUF nor safetensors."""
    pickles = [file.path for file in files if PurePosixPath(file.path).suffix.lower() in _PICKLES]
    if pickles:
        more = f" and {len(pickles) - 3} more" if len(pickles) > 3 else ""
        return UnsupportedModel(
            f"{name.repo} has its weights in {', '.join(pickles[:3])}{more}: pickled weights are never read, "
            "opening them would run what they hold",
            hint="look for a GGUF or safetensors repository of the same model",
        )
    return UnsupportedModel(
        f"{name.repo} has neither a GGUF file nor config.json with model.safetensors",
        hint="look for a GGUF or safetensors repository of the same model",
    )
