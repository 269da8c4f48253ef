"""What a pack will do, decided from headers alone: types, places, memory, and which file would be replaced."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipo.base.errors import UsageError
from pipo.base.manifest import Manifest
from pipo.base.tensor_type import TensorType
from pipo.compute.ggml import Library
from pipo.formats.checkpoint import Checkpoint
from pipo.formats.gguf_keys import hyper_parameter_keys
from pipo.formats.gguf_metadata import GgufMetadata, Scalar
from pipo.formats.gguf_writer import copy_entries, entry, spans_to_copy
from pipo.models.registry import stages_of
from pipo.packing.checksums import OWN_PREFIX
from pipo.packing.journal import Identity
from pipo.packing.layout import REPLACED_KEYS, PackLayout, lay_out
from pipo.packing.memory import PackMemory, fit_memory, process_bytes_now
from pipo.packing.types import Mix, TensorPlan, check_readable


@dataclass(frozen=True, slots=True)
class PackPlan:
    """A pack before it begins: what the file will be, and the memory it is made in."""

    manifest: Manifest
    layout: PackLayout
    memory: PackMemory
    limit_bytes: int
    identity: Identity  # of the result: another source, type or library makes another file

    @property
    def fallbacks(self) -> list[TensorPlan]:
        return [tensor for tensor in self.layout.tensors if tensor.type is not tensor.wanted]

    @property
    def requantised(self) -> list[TensorPlan]:
        return [tensor for tensor in self.layout.tensors if tensor.is_requantised]

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Of the output, largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.layout.tensors:
            sizes[tensor.type.name] += tensor.num_bytes
        return dict(sizes.most_common())

    @property
    def bits_per_weight(self) -> float:
        num_elems = sum(tensor.num_elems for tensor in self.layout.tensors)
        return 8 * sum(tensor.num_bytes for tensor in self.layout.tensors) / max(num_elems, 1)


def plan_pack(
    checkpoint: Checkpoint,
    mix: Mix,
    lib: Library,
    limit_bytes: int,
    num_workers: int,
    text_entries: Sequence[bytes] = (),
) -> PackPlan:
    """Decide everything from headers. `text_entries` are the keys of a folder's tokenizer; a GGUF brings its own.

    Raises ModelError, OverBudget naming the smallest limit that works.
    """
    manifest = checkpoint.manifest
    stages = stages_of(manifest)
    bare = lay_out(manifest, stages, mix, ())  # without what the source says: that takes memory
    check_readable(manifest, bare.tensors, [type_ for type_ in TensorType if lib.multiplies(type_)])
    source = _entries_of(checkpoint, text_entries)
    header_bytes = bare.data_start + source.num_bytes
    memory = fit_memory(bare.tensors, header_bytes, limit_bytes, num_workers, process_bytes_now())
    layout = lay_out(manifest, stages, mix, source.read())
    return PackPlan(manifest, layout, memory, limit_bytes, identity_of(manifest, layout, lib))


def check_output(path: Path, manifest: Manifest, *, overwrite: bool, hint: str | None = None) -> None:
    """Raises UsageError where the file would replace what it must not, or cannot be; `hint` where it is there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="name another file with -o") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UsageError(f"{path} is {what}", hint="name a file with -o")
    if any(path.samefile(file) for file in manifest.files):
        raise UsageError(f"{path} is the model itself", hint="name another file with -o")
    if not overwrite:
        more = f"; {hint}" if hint else ""
        raise UsageError(f"{path} is there already", hint=f"--overwrite replaces it, -o names another file{more}")


@dataclass(frozen=True, slots=True)
class _SourceEntries:
    """What the source says besides tensors: how much, and, once there is memory for it, the entries."""

    num_bytes: int
    read: Callable[[], Sequence[bytes]]


def _entries_of(checkpoint: Checkpoint, text_entries: Sequence[bytes]) -> _SourceEntries:
    metadata = checkpoint.metadata
    if isinstance(metadata, GgufMetadata):
        spans = spans_to_copy(metadata, without=REPLACED_KEYS, prefix=OWN_PREFIX)
        return _SourceEntries(sum(size for _, size in spans), partial(copy_entries, metadata, spans))
    keys: dict[str, Scalar] = {"general.type": "model", "general.name": checkpoint.manifest.name}
    keys |= hyper_parameter_keys(checkpoint.manifest)
    entries = [*(entry(key, value) for key, value in keys.items()), *text_entries]
    return _SourceEntries(sum(map(len, entries)), lambda: entries)


def identity_of(manifest: Manifest, layout: PackLayout, lib: Library) -> Identity:
    sources = [
        [str(file.resolve()), identity.inode, identity.num_bytes, identity.modified_ns]
        for file, identity in zip(manifest.files, manifest.identities, strict=True)
    ]
    return {"pipo_pack": 1, "sources": sources, "layout": layout.fingerprint, "libggml": lib.version_text}
